"""What every stage of a job is given."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rayprune.orchestrator.execution.executor import Executor
from rayprune.orchestrator.execution.failures import Decision, WorkerFailure, decide, stopping_error
from rayprune.orchestrator.execution.run_folder import PLAN_FILE, RunFolder
from rayprune.orchestrator.planning.plan import Plan
from rayprune.specs.job import JobSpec
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Manifest, record_of, write_json

T = TypeVar("T")


@dataclass
class Context:
    """The job, its plan, its folder, and the workers."""

    job: JobSpec
    checkpoint: Checkpoint
    plan: Plan
    folder: RunFolder
    executor: Executor
    show: Callable[[dict[str, Any]], object]
    source: Checkpoint | None = None
    """The model the job names, where `checkpoint` is what a training has made of it."""
    selections: list[Manifest] | None = None
    """The units that stay, where they were chosen before a training."""
    gradients: Manifest | None = None
    """The gradients that activations are scaled by, where the method asks for them."""
    memory: PeakMemory = field(default_factory=PeakMemory)

    @property
    def original(self) -> Checkpoint:
        """The model the job names."""
        return self.source or self.checkpoint

    def inputs(self, tokens: Manifest) -> list[str]:
        """What everything that looks at activations depends on; a latency table, since it may
        decide what stays.
        """
        budget = self.job.budget
        table = budget.latency_table if budget.latency_ms else None
        others = [
            *([self.gradients.digest] if self.gradients else []),
            *([record_of(Path(table)).sha256] if table else []),
        ]
        return [tokens.digest, self.checkpoint.identity, *others]

    def settle(self, plan: Plan) -> None:
        """Go on with a plan, and write it down."""
        self.plan = plan
        write_json(self.folder.path / PLAN_FILE, plan.document())

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event and show it."""
        record = {"event": event} | fields
        self.folder.emit(record)
        self.show(record)

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Mark the beginning and end of a stage of so many steps."""
        start = time.monotonic()
        self.emit("stage-started", stage=name, steps=steps)
        yield
        self.emit(
            "stage-finished",
            stage=name,
            steps=steps,
            seconds=time.monotonic() - start,
            peak_memory_bytes=self.peak_memory_bytes(),
        )

    def peak_memory_bytes(self) -> dict[str, int]:
        """Peak private memory of the driver and of every worker that has answered, in bytes."""
        return {"driver": self.memory.bytes} | self.executor.peak_memory_bytes

    def once(
        self, task: str, expected: str, work: Callable[[], object], redo_stale: bool = False
    ) -> Manifest:
        """The manifest of a task, after doing its work unless it is done already.

        Raises:
            VerificationError: it was done from other inputs (and `redo_stale` does not say to do it
                again).
            ResourceError: the failure policy says stop.
        """
        if done := self.folder.finished(task, expected, redo_stale):
            self.emit("task-found", task=task)
            return done
        self.attempt(task, work)
        done = self.folder.finished(task, expected)
        assert done is not None, f"{task} left no manifest"
        return done

    def attempt(self, task: str, work: Callable[[], T]) -> T:
        """Do a task's work, again after a lost worker, as often as the failure policy says.

        Raises:
            ResourceError: the policy says stop.
        """
        failed = 0
        while True:
            try:
                if failed:
                    self.executor.replace_lost()
                return work()
            except WorkerFailure as error:
                failed += 1
                decision = decide(error.failure, failed, self.job.parallel.retries)
                self.emit("worker-failed", task=task, detail=str(error), decision=decision.value)
                if decision is Decision.STOP:
                    raise stopping_error(error, task, failed) from None
