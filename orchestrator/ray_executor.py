"""The one module that knows Ray: one actor per worker, Ray's own retries off, waits polled so that signals get through.

Ray's retries stay off because with them on it re-runs an actor's calls in another order, silently. The driver retries.
"""

import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as ray_errors

from orchestrator.executor import Call, Executor, Receipt
from orchestrator.failures import Failure, WorkerFailure
from specs.errors import ResourceError
from specs.job import JobSpec
from specs.memory import MemoryPlan

START_SECONDS = 300.0
CONNECT_SECONDS = 10.0
PING_SECONDS = 20.0
POLL_SECONDS = 5.0
_LOST = (
    ray_errors.RayActorError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
    ray_errors.WorkerCrashedError,
    ray_errors.LocalRayletDiedError,
    ray_errors.RaySystemError,
    ray_errors.OwnerDiedError,
    ray_errors.GetTimeoutError,
)


def classify(error: BaseException) -> Failure | None:
    """The failure behind an exception, or None when it is the step's own error (a task error is a RayError too)."""
    if isinstance(error, ray_errors.RayTaskError):
        cause = getattr(error, "cause", None)  # a lost argument is found out inside the step that needs it
        return Failure.PROCESS_LOST if isinstance(cause, _LOST) else None
    if isinstance(error, ray_errors.OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if isinstance(error, _LOST):
        return Failure.PROCESS_LOST
    if isinstance(error, (ray_errors.ActorUnschedulableError, ray_errors.TaskUnschedulableError)):
        return Failure.UNSCHEDULABLE
    return None


def _check_reachable(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself would wait for minutes.

    Raises:
        ResourceError: the address is HOST:PORT and nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ResourceError(f"cluster.address {address!r}: cannot connect: {error}; is the head node up, and this its GCS port?") from None


class RayExecutor(Executor):
    """One actor per worker, on a private Ray of this machine or on a cluster."""

    def __init__(self, job: JobSpec, run_folder: Path, memory: MemoryPlan) -> None:
        super().__init__(job, run_folder, memory)
        self._actors: list[Any] = []
        self._device = "cpu"
        self._connected_here = False

    def start(self) -> None:
        """Connect and start one actor per worker."""
        if self._actors:
            return
        self._connect()
        self._device = self._choose_device()
        self._actors = [self._new_actor() for _ in range(self.num_workers)]
        self._ready(self._actors)

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        handler = signal.getsignal(signal.SIGTERM)
        if self.job.cluster.address == "local":
            slots = max(os.cpu_count() or 1, self.num_workers * self.job.parallel.threads_per_worker)
            ray.init(address="local", num_cpus=slots, include_dashboard=False, **quiet)
        else:
            _check_reachable(self.job.cluster.address)
            try:
                ray.init(address=self.job.cluster.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError, ray_errors.RayError) as error:
                raise ResourceError(f"cluster.address {self.job.cluster.address!r}: cannot connect: {error}") from None
        signal.signal(signal.SIGTERM, handler)  # ray.init replaces it
        self._connected_here = True

    def _choose_device(self) -> str:
        total = ray.cluster_resources()
        gpus, wanted = int(total.get("GPU", 0)), self.job.parallel.device
        if wanted == "cuda" and gpus < self.num_workers:
            raise ResourceError(
                f"parallel.workers: {self.num_workers} workers need as many GPUs, the cluster has {gpus}; lower it or add nodes"
            )
        device = "cuda" if wanted != "cpu" and gpus >= self.num_workers else "cpu"
        need = self.num_workers * self.job.parallel.threads_per_worker
        if need > total.get("CPU", 0):
            raise ResourceError(
                f"parallel: {self.num_workers} workers of {self.job.parallel.threads_per_worker} threads need {need} CPUs, "
                f"the cluster has {total.get('CPU', 0):g}; lower parallel.workers or parallel.threads_per_worker"
            )
        return device

    def _new_actor(self) -> Any:
        from workers.worker import Worker

        actor = ray.remote(Worker).options(
            num_cpus=self.job.parallel.threads_per_worker,
            num_gpus=1 if self._device == "cuda" else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        return actor.remote(self.job, str(self.run_folder), self._device, self.memory)

    def _ready(self, actors: Sequence[Any]) -> None:
        try:
            ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=START_SECONDS)
        except ray_errors.GetTimeoutError:
            detail = f"no answer within {START_SECONDS:.0f} s; the cluster has {ray.cluster_resources()}"
            raise WorkerFailure(Failure.UNSCHEDULABLE, detail) from None
        except ray_errors.RayError as error:
            raise self._translated(error) from None

    def _translated(self, error: ray_errors.RayError) -> BaseException:
        failure = classify(error)
        if failure is not None:
            return WorkerFailure(failure, str(error).splitlines()[0])
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error

    def submit(self, worker: int, method: str, *args: Any) -> Call:
        """Queue the step on its actor."""
        self.start()
        receipt, payload = getattr(self._actors[worker], method).options(num_returns=2).remote(*args)
        return Call(worker, method, receipt, payload)

    def _receipts(self, calls: Sequence[Call]) -> list[Receipt]:
        pending = [call.receipt for call in calls]
        try:
            while pending:
                done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
                ray.get(done, timeout=START_SECONDS)
            receipts: list[Receipt] = ray.get([call.receipt for call in calls], timeout=START_SECONDS)
        except ray_errors.RayError as error:
            raise self._translated(error) from None
        return receipts

    def replace_lost(self) -> list[int]:
        """Replace the actors that do not answer; a busy one answers when its step ends, so only dead ones are replaced."""
        lost = [number for number, actor in enumerate(self._actors) if not self._answers(actor)]
        for number in lost:
            ray.kill(self._actors[number])
            self._actors[number] = self._new_actor()
        self._ready([self._actors[number] for number in lost])
        return lost

    @staticmethod
    def _answers(actor: Any) -> bool:
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=PING_SECONDS)
        except ray_errors.GetTimeoutError:
            return True
        except ray_errors.RayError:
            return False
        return True

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._connected_here:
            ray.shutdown()
            self._connected_here = False
