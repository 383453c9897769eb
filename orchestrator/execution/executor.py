"""Runs steps on workers. An executor starts workers on first use, hands them steps, and returns
their small receipts.

A step's payload stays where it was made; a handle to it can be given to another step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from rayprune.orchestrator.execution.steps import Call, Receipt, Steps
from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.shards import even_parts
from rayprune.workers.store.training_stage import Finetune

Notify = Callable[..., None]
"""Takes the name of an event and its fields."""
MemoryOn = Callable[[str], MemoryPlan]
"""What a worker keeps and where, given the device that workers compute on: `cpu` or `cuda`."""


Progress = Callable[[], object]
"""How far steps have come."""


def no_progress() -> object:
    """Nothing: only its end tells of a step."""
    return None


def unheard(event: str, **fields: Any) -> None:
    """Ignore an event."""


def chosen_device(wanted: str, num_gpus: float, num_workers: int) -> str:
    """Where workers on a cluster with so many GPUs compute: `auto` takes them if there is one for
    each.
    """
    if wanted != "auto":
        return wanted
    return "cuda" if num_gpus >= num_workers else "cpu"


class Executor(ABC):
    """Runs steps on workers; every executor gives the same results."""

    def __init__(self, job: JobSpec, run_folder: Path, memory_on: MemoryOn) -> None:
        self.job, self.run_folder, self.memory_on = job, run_folder, memory_on
        self.num_workers = job.parallel.workers
        self.scope = ""
        self.computed_on: str | None = None
        """How finished tasks were computed, and workers compute, once either is known."""
        self.step_limit = math.inf
        """Seconds without the end of any step, or progress of one that tells of it, after which a
        worker has hung.
        """
        self._has_said = ""
        self.peak_memory_bytes: dict[str, int] = {}
        self.step_seconds: dict[str, float] = {}
        self.busy_seconds: dict[str, float] = {}
        """In steps, by worker."""
        self._step_seconds_told: dict[str, float] = {}
        self._warned: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shares(self, count: int) -> list[tuple[int, tuple[int, int]]]:
        """Spread `count` items over the workers: (worker, (first, behind the last)) of each that
        gets some.
        """
        parts = [part for part in even_parts(count, self.num_workers) if part]
        return [(worker, (part.start, part.stop)) for worker, part in enumerate(parts)]

    @abstractmethod
    def start(self, notify: Notify = unheard) -> None:
        """Start the workers, unless they run; the first step does it too. Tell `notify` what is
        waited for.

        Raises:
            WorkerFailure: they cannot be started.
        """

    @abstractmethod
    def follow(self, event: Mapping[str, Any]) -> None:
        """Hear of what happens in the run, for those who watch what it runs on."""

    def on(self, worker: int) -> Steps:
        """The steps of a worker, as calls."""
        return Steps(partial(self._submit, worker))

    @abstractmethod
    def _submit(self, worker: int, step: str, *args: Any) -> Call[Any]:
        """Start a step on a worker; payload handles among `args` are resolved where the step
        runs.
        """

    @abstractmethod
    def _receipts(self, calls: Sequence[Call[Any]], progress: Progress) -> list[Receipt]:
        """Return the receipts of some steps, in order; fail as soon as one fails."""

    def wait(self, calls: Sequence[Call[Any]], progress: Progress = no_progress) -> list[Receipt]:
        """Wait for some steps and return their receipts, in order. As long as `progress` gives
        other values they have not hung.

        Raises:
            RaypruneError: the step's own error.
            WorkerFailure: the machinery failed.
        """
        receipts = self._receipts(calls, progress)
        for call, receipt in zip(calls, receipts, strict=True):
            for kind, peak in receipt["peak_memory_bytes"].items():
                name = f"worker-{call.worker}{kind}"
                self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), peak)
            self.step_seconds[call.step] = (
                self.step_seconds.get(call.step, 0.0) + receipt["seconds"]
            )
            name = f"worker-{call.worker}"
            self.busy_seconds[name] = self.busy_seconds.get(name, 0.0) + receipt["seconds"]
            self._warned += receipt["warned"]
        return receipts

    def seconds_since(self) -> dict[str, float]:
        """Seconds that steps have taken since this was last asked, by name; of all workers."""
        told, self._step_seconds_told = self._step_seconds_told, self.step_seconds.copy()
        taken = {step: all_ - told.get(step, 0.0) for step, all_ in self.step_seconds.items()}
        return {step: seconds for step, seconds in taken.items() if seconds > 0}

    def warned(self) -> list[str]:
        """What workers had to tell since this was last asked."""
        told, self._warned = list(dict.fromkeys(self._warned)), []
        return told

    def use_model(self, job: JobSpec, path: Path, scope: str) -> None:
        """Go on with this model in this job and scope; workers forget all they keep if one is
        another.
        """
        model = job.model.model_copy(update={"path": str(path)})
        wanted = job.model_copy(update={"model": model})
        if (wanted, scope) == (self.job, self.scope):
            return
        self.job, self.scope = wanted, scope
        self._begin_anew()

    def how_computed(self) -> str:
        """Device kind and type of forward passes on the workers; asked once."""
        if not self._has_said:
            (receipt,) = self.wait([self.on(0).how_computed()])
            self._has_said = receipt["computed_on"]
        return self._has_said

    @property
    def device_kind(self) -> str:
        """The kind of device that workers compute on, once it is known."""
        return str(self.computed_on).partition(" ")[0]

    @abstractmethod
    def _begin_anew(self) -> None:
        """Have workers that run go on with the job and the scope as they are now."""

    @abstractmethod
    def drop_workers(self) -> None:
        """Stop the workers and what they keep; the next step starts new ones."""

    @abstractmethod
    def join_workers(self) -> None:
        """See that the workers are one group, by which they send each other tensors.

        Raises:
            WorkerFailure: they do not find each other.
        """

    @abstractmethod
    def train(self, stage: Finetune) -> None:
        """Run a training stage on as many ranks as there are workers; the workers give up what they
        hold.

        Raises:
            RaypruneError: the stage's own error.
            WorkerFailure: the machinery failed.
        """

    @abstractmethod
    def replace_lost(self) -> list[int]:
        """Start new workers for those that no longer answer; returns their numbers."""

    @abstractmethod
    def close(self) -> None:
        """Stop all workers."""


class InProcessExecutor(Executor):
    """One worker in the driver's own process; steps run as they are submitted."""

    def __init__(self, job: JobSpec, run_folder: Path, memory_on: MemoryOn) -> None:
        super().__init__(job, run_folder, memory_on)
        self.num_workers = 1
        self._worker: Any = None

    def start(self, notify: Notify = unheard) -> None:
        """Import torch and make the worker."""
        if self._worker is None:
            from rayprune.workers.machine.device import device_of
            from rayprune.workers.worker import Worker

            device = device_of(self.job.parallel.device).type
            memory = self.memory_on(device)
            self._worker = Worker(self.job, str(self.run_folder), device, memory, self.scope)

    def _submit(self, worker: int, step: str, *args: Any) -> Call[Any]:
        """Run the step now."""
        self.start()
        return Call(worker, step, *self._worker.run(step, *args))

    def _receipts(self, calls: Sequence[Call[Any]], progress: Progress) -> list[Receipt]:
        return [call.receipt for call in calls]

    def follow(self, event: Mapping[str, Any]) -> None:
        """Nobody watches a process alone."""

    def join_workers(self) -> None:
        """There is nobody to join."""

    def train(self, stage: Finetune) -> None:
        """Train in this process, alone."""
        self.drop_workers()
        self.wait([self.on(0).train(stage, None, 0, 1)])

    def replace_lost(self) -> list[int]:
        """Replace none: the worker lives in this process."""
        return []

    def _begin_anew(self) -> None:
        self.drop_workers()

    def drop_workers(self) -> None:
        """Forget the worker and what it keeps."""
        self._worker = None

    def close(self) -> None:
        """Forget the worker."""
        self.drop_workers()
