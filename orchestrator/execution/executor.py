"""Where steps run. An executor starts workers on first use, hands them steps, and returns their
small receipts.

A step's payload stays where it was made, behind a handle that can be given to another step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.shards import even_parts
from rayprune.workers.store.training_stage import Finetune

Receipt = dict[str, Any]
Notify = Callable[..., None]
"""Takes the name of an event and its fields."""


def unheard(event: str, **fields: Any) -> None:
    """Where events go that nobody listens to."""


@dataclass(frozen=True)
class Call:
    """A step under way: its receipt and its payload, as handles of the executor."""

    worker: int
    method: str
    receipt: Any
    payload: Any


class Executor(ABC):
    """Interchangeable workers behind one interface; results do not depend on which one is used."""

    def __init__(self, job: JobSpec, run_folder: Path, memory: MemoryPlan) -> None:
        self.job, self.run_folder, self.memory = job, run_folder, memory
        self.num_workers = job.parallel.workers
        self.scope = ""
        self.computed_on: str | None = None
        """How finished tasks were computed, and workers compute, once either is known."""
        self._has_said = ""
        self.peak_memory_bytes: dict[str, int] = {}
        self.step_seconds: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shares(self, count: int) -> list[tuple[int, tuple[int, int]]]:
        """So many items spread over the workers: each worker that gets some, with the first one and
        the one behind its last.
        """
        parts = [part for part in even_parts(count, self.num_workers) if part]
        return [(worker, (part.start, part.stop)) for worker, part in enumerate(parts)]

    @abstractmethod
    def start(self, notify: Notify = unheard) -> None:
        """Start the workers, unless they run; the first step does it too. What is waited for goes
        to `notify`.

        Raises:
            WorkerFailure: they cannot be started.
        """

    @abstractmethod
    def submit(self, worker: int, method: str, *args: Any) -> Call:
        """Start a step on a worker; payload handles among `args` are resolved where the step
        runs.
        """

    @abstractmethod
    def _receipts(self, calls: Sequence[Call]) -> list[Receipt]:
        """The receipts of some steps, in order, failing as soon as one fails."""

    def wait(self, calls: Sequence[Call]) -> list[Receipt]:
        """The receipts of some steps, in order.

        Raises:
            RaypruneError: the step's own error.
            WorkerFailure: the machinery failed.
        """
        receipts = self._receipts(calls)
        for call, receipt in zip(calls, receipts, strict=True):
            for kind, peak in receipt["peak_memory_bytes"].items():
                name = f"worker-{call.worker}{kind}"
                self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), peak)
            self.step_seconds[call.method] = (
                self.step_seconds.get(call.method, 0.0) + receipt["seconds"]
            )
        return receipts

    def use_model(self, path: Path, scope: str) -> None:
        """Let the workers work on this model and in this scope from now on."""
        if (str(path), scope) == (self.job.model.path, self.scope):
            return
        self.scope = scope
        self.job = self.job.model_copy(
            update={"model": self.job.model.model_copy(update={"path": str(path)})}
        )
        self.drop_workers()

    def how_computed(self) -> str:
        """Device kind and type of forward passes on the workers; asked once."""
        if not self._has_said:
            (receipt,) = self.wait([self.submit(0, "how_computed")])
            self._has_said = receipt["computed_on"]
        return self._has_said

    @abstractmethod
    def drop_workers(self) -> None:
        """Let the workers go; the next step starts new ones."""

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

    def __init__(self, job: JobSpec, run_folder: Path, memory: MemoryPlan) -> None:
        super().__init__(job, run_folder, memory)
        self.num_workers = 1
        self._worker: Any = None

    def start(self, notify: Notify = unheard) -> None:
        """Import torch and make the worker."""
        if self._worker is None:
            from rayprune.workers.worker import Worker

            self._worker = Worker(
                self.job, str(self.run_folder), self.job.parallel.device, self.memory, self.scope
            )

    def submit(self, worker: int, method: str, *args: Any) -> Call:
        """Run the step now."""
        self.start()
        return Call(worker, method, *getattr(self._worker, method)(*args))

    def _receipts(self, calls: Sequence[Call]) -> list[Receipt]:
        return [call.receipt for call in calls]

    def train(self, stage: Finetune) -> None:
        """One plain process."""
        self.drop_workers()
        from rayprune.workers.training.rank import train_rank

        train_rank(stage, 0, 1, self.job.parallel.device)

    def replace_lost(self) -> list[int]:
        """Nothing can be lost without this process."""
        return []

    def drop_workers(self) -> None:
        """Forget the worker and what it keeps."""
        self._worker = None

    def close(self) -> None:
        """Forget the worker."""
        self.drop_workers()
