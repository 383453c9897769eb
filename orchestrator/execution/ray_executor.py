"""The one module that knows Ray's actors: one actor per worker, Ray's own retries off, waits polled
so that signals get through.

Ray's retries stay off because with them on it re-runs an actor's calls in another order, silently.
The driver retries.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as ray_errors

from rayprune.orchestrator.execution.executor import (
    Executor,
    MemoryOn,
    Notify,
    Progress,
    chosen_device,
    no_progress,
    unheard,
)
from rayprune.orchestrator.execution.failures import Failure, WorkerFailure
from rayprune.orchestrator.execution.ray_failures import translated
from rayprune.orchestrator.execution.ray_metrics import Metrics
from rayprune.orchestrator.execution.ray_start import begin, end
from rayprune.orchestrator.execution.steps import Call, Handle, Receipt
from rayprune.specs.errors import ResourceError
from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.training_stage import Finetune

RECEIPT_SECONDS = 300.0
PING_SECONDS = 20.0
LOCALHOST = "127.0.0.1"
POLL_SECONDS = 5.0
WAIT_POLL_SECONDS = 1.0


def _cluster_has(names: Iterable[str]) -> dict[str, float]:
    total = ray.cluster_resources()
    return {name: float(total.get(name, 0)) for name in names}


def _listed(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in amounts.items())


def bytes_in(folder: Path) -> int:
    """Bytes of the files that lie in a folder now; others may write and remove some."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found += os.stat(Path(place, name)).st_size
    return found


_kept: list[tuple[tuple[int, str], Any]] | None = None
"""Actors that a run has left for the next one, with what each may use; None: a run stops its own.
"""


@contextmanager
def workers_kept() -> Iterator[None]:
    """While it lasts, the workers of a run that has ended well are those of the next one, which
    would take seconds to import what they need.
    """
    global _kept
    outer, _kept = _kept, []
    try:
        yield
    finally:
        for _, actor in _kept:
            ray.kill(actor)
        _kept = outer


def _alive(actors: Sequence[Any]) -> dict[int, bool]:
    """Whether actors live, by their places among these: all are asked at once, and those that do
    not answer in time are left out.
    """
    asked = {actor.__ray_ready__.remote(): number for number, actor in enumerate(actors)}
    if not asked:
        return {}
    answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=PING_SECONDS)
    return {asked[ping]: _is_well(ping) for ping in answered}


def _is_well(answered: Any) -> bool:
    try:
        ray.get(answered)
    except ray_errors.RayError:
        return False
    return True


@contextmanager
def connected(*jobs: JobSpec) -> Iterator[None]:
    """Ray, for as long as several jobs of one `cluster` need it; one that is there stays.

    Raises:
        SpecError, ResourceError: as `begin` says.
    """
    if ray.is_initialized():
        yield
        return
    needed = (job.parallel.workers * job.parallel.threads_per_worker for job in jobs)
    begin(jobs[0].cluster, max(os.cpu_count() or 1, *needed))
    try:
        yield
    finally:
        end()


class Worker:
    """A worker in an actor. There alone its class is imported, which takes seconds: the driver has
    no use for torch.
    """

    def __init__(self, *arguments: Any) -> None:
        from rayprune.workers.worker import Worker as Inside

        self._inside = Inside(*arguments)

    def begin(self, *arguments: Any) -> None:
        """Go on with another job, model or scope."""
        self._inside.begin(*arguments)

    def run(self, step: str, *arguments: Any) -> tuple[Receipt, Any]:
        """Do a step; its receipt and its payload."""
        return self._inside.run(step, *arguments)


class RayExecutor(Executor):
    """One actor per worker, on a private Ray of this machine or on a cluster."""

    def __init__(self, job: JobSpec, run_folder: Path, memory_on: MemoryOn) -> None:
        super().__init__(job, run_folder, memory_on)
        self._actors: list[Any] = []
        self._device, self._memory = "cpu", MemoryPlan()
        self._connection = ExitStack()
        self._hung = set[int]()
        self._joined = False
        self._metrics: Metrics | None = None

    def start(self, notify: Notify = unheard) -> None:
        """Connect and start one actor per worker; waits for their nodes as long as the job allows.

        An autoscaler sees the actors that wait. They go with the driver, however it ends, so
        nothing keeps nodes up afterwards.
        """
        if self._actors:
            return
        self._connection.enter_context(connected(self.job))
        num_gpus = ray.cluster_resources().get("GPU", 0)
        self._device = chosen_device(self.job.parallel.device, num_gpus, self.num_workers)
        self._memory = self.memory_on(self._device)
        self._actors = self._taken_over()
        missing = self.num_workers - len(self._actors)
        self._actors += [self._new_actor() for _ in range(missing)]
        self._await_nodes(notify)
        self._ready(self._actors)

    @property
    def _may_use(self) -> tuple[int, str]:
        """What tells a worker from others: its threads and its device."""
        return self.job.parallel.threads_per_worker, self._device

    def _taken_over(self) -> list[Any]:
        """Workers that the run before has left, as many as are needed and answer; no other stays.
        They are idle: that run has ended well.
        """
        if not _kept:
            return []
        left = [actor for may_use, actor in _kept if may_use == self._may_use][: self.num_workers]
        alive = [left[number] for number, is_well in _alive(left).items() if is_well]
        for _, actor in _kept:
            if actor not in alive:
                ray.kill(actor)
        _kept.clear()
        for actor in alive:
            actor.begin.remote(*self._worker_arguments())
        return alive

    def __exit__(self, *error: object) -> None:
        """Leave the workers to the next run, where there may be one and this one has ended well."""
        if _kept is not None and error[0] is None:
            _kept.extend((self._may_use, actor) for actor in self._actors)
            self._actors = []
        super().__exit__(*error)

    def follow(self, event: Mapping[str, Any]) -> None:
        """Tell Ray's metrics of an event, from the start of Ray on."""
        if self._metrics is None and ray.is_initialized():
            self._metrics = Metrics(self.run_folder.name)
        if self._metrics:
            self._metrics.follow(event)

    def _need(self) -> dict[str, float]:
        cpus = {"CPU": float(self.num_workers * self.job.parallel.threads_per_worker)}
        return cpus | {"GPU": float(self.num_workers)} if self._device == "cuda" else cpus

    def _await_nodes(self, notify: Notify) -> None:
        """Wait until the nodes together have what the workers need, within the job's limit."""
        need, shown = self._need(), None
        deadline = time.monotonic() + self.job.cluster.wait_seconds
        while any((have := _cluster_has(need))[name] < amount for name, amount in need.items()):
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"parallel: {self.num_workers} workers need {_listed(need)}, the cluster has"
                    f" {_listed(have)}; lower parallel.workers or parallel.threads_per_worker, add"
                    " nodes, or set cluster.wait_seconds where an autoscaler adds them"
                )
            if have != shown:
                notify(
                    "waiting-for-nodes",
                    have=have,
                    need=need,
                    wait_seconds=self.job.cluster.wait_seconds,
                )
            shown = have
            time.sleep(WAIT_POLL_SECONDS)

    def _new_actor(self) -> Any:
        actor = ray.remote(Worker).options(
            num_cpus=self.job.parallel.threads_per_worker,
            num_gpus=1 if self._device == "cuda" else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        return actor.remote(*self._worker_arguments())

    def _worker_arguments(self) -> tuple[JobSpec, str, str, MemoryPlan, str]:
        return self.job, str(self.run_folder), self._device, self._memory, self.scope

    def _ready(self, actors: Sequence[Any]) -> None:
        limit = self.job.cluster.start_seconds + self.job.cluster.wait_seconds
        try:
            ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=limit)
        except ray_errors.GetTimeoutError:
            detail = f"no answer within {limit:.0f} s; the cluster has {ray.cluster_resources()}"
            raise WorkerFailure(Failure.UNSCHEDULABLE, detail) from None
        except ray_errors.RayError as error:
            raise translated(error) from None

    def _submit(self, worker: int, step: str, *args: Any) -> Call[Any]:
        self.start()
        run = self._actors[worker].run.options(num_returns=2, name=f"Worker.{step}")
        receipt, payload = run.remote(step, *args)
        return Call(worker, step, receipt, payload)

    def _receipts(self, calls: Sequence[Call[Any]], progress: Progress) -> list[Receipt]:
        pending = [call.receipt for call in calls]
        since, come = time.monotonic(), progress()
        try:
            while pending:
                poll = min(POLL_SECONDS, self.step_limit)
                done, pending = ray.wait(pending, num_returns=1, timeout=poll)
                ray.get(done, timeout=RECEIPT_SECONDS)
                now = progress()
                if done or now != come:
                    since, come = time.monotonic(), now
                elif time.monotonic() - since >= self.step_limit:
                    raise self._hang([call for call in calls if call.receipt in pending])
            receipts: list[Receipt] = ray.get(
                [call.receipt for call in calls], timeout=RECEIPT_SECONDS
            )
        except ray_errors.RayError as error:
            raise self._first(translated(error), calls) from None
        return receipts

    def _first(self, error: BaseException, calls: Sequence[Call[Any]]) -> BaseException:
        """What became of the worker that others have lost, where they were the first to tell."""
        if not (isinstance(error, WorkerFailure) and error.failure is Failure.PEER_LOST):
            return error
        asked = [call.receipt for call in calls]
        for receipt in ray.wait(asked, num_returns=len(asked), timeout=PING_SECONDS)[0]:
            try:
                ray.get(receipt)
            except ray_errors.RayError as other:
                cause = translated(other)
                if not (isinstance(cause, WorkerFailure) and cause.failure is error.failure):
                    return cause
        return error

    def _hang(self, calls: Sequence[Call[Any]]) -> WorkerFailure:
        """Note whose steps do not end: these workers are replaced, whether they answer or not."""
        self._hung |= {call.worker for call in calls}
        workers = ", ".join(f"worker-{number}" for number in sorted(self._hung))
        steps = ", ".join(sorted({call.step for call in calls}))
        return WorkerFailure(
            Failure.HUNG, f"{workers} ({steps}): nothing for {self.step_limit:.0f} s"
        )

    def join_workers(self) -> None:
        """Have them join at an address of the first one's node, unless they have."""
        if self._joined:
            return
        self.start()
        address, workers = self._meeting_place(), range(self.num_workers)
        self.wait([self.on(n).join_group(address, n, self.num_workers) for n in workers])
        self._joined = True

    def _meeting_place(self) -> tuple[str, int]:
        """Where workers find each other: on the first one's node."""
        host = LOCALHOST
        if self.job.cluster.address != "local":
            ask = self._actors[0].__ray_call__
            asked = ask.remote(lambda _: ray.util.get_node_ip_address())
            (found,) = self._receipts([Call(0, "open_group", asked, Handle())], no_progress)
            host = str(found)
        (opened,) = self.wait([self.on(0).open_group(host)])
        host, port = opened["address"]
        return host, port

    def train(self, stage: Finetune) -> None:
        """Train on all workers; they have hung if nothing is written for the time of a step. None
        of a gang that has failed stays, since the others wait for those that are lost.
        """
        self.start()
        count = self.num_workers
        try:
            self._begin_anew()
            address = self._meeting_place() if count > 1 else None
            calls = [self.on(n).train(stage, address, n, count) for n in range(count)]
            self.wait(calls, partial(bytes_in, Path(stage.folder)))
        except BaseException:
            self.drop_workers()
            raise

    def replace_lost(self) -> list[int]:
        """Replace the dead actors and those that hang. All are asked at once; another one that does
        not answer in time is busy: it answers when its step ends.
        """
        asked = [n for n in range(len(self._actors)) if n not in self._hung]
        found = _alive([self._actors[number] for number in asked])
        dead = {asked[place] for place, is_well in found.items() if not is_well}
        lost, self._hung, self._joined = sorted(dead | self._hung), set(), False
        for number in lost:
            ray.kill(self._actors[number])
            self._actors[number] = self._new_actor()
        self._ready([self._actors[number] for number in lost])
        return lost

    def _begin_anew(self) -> None:
        """The actors stay: a new one would take seconds to import what it needs. One that is lost
        is noticed at its next step.
        """
        self._joined = False
        if self._actors:
            self._memory = self.memory_on(self._device)
        for actor in self._actors:
            actor.begin.remote(*self._worker_arguments())

    def drop_workers(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._hung, self._joined = [], set(), False

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        self.drop_workers()
        self._connection.close()
