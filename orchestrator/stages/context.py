"""The services that every stage is given."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rayprune.orchestrator.execution.executor import Executor
from rayprune.orchestrator.execution.failures import Decision, WorkerFailure, decide, stopping_error
from rayprune.orchestrator.execution.run_folder import RunFolder, forget_report
from rayprune.orchestrator.execution.task_store import TaskStore
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.stages.reads import (
    KEPT_IN_STORE,
    WITHOUT_ACTIVATIONS,
    kind_of,
    options_read,
)
from rayprune.specs.errors import SpecError, VerificationError
from rayprune.specs.job import JobSpec
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.store.files import (
    MANIFEST_NAME,
    Manifest,
    Task,
    damaged_files,
    read_manifest,
    remove_task,
    write_json,
)
from rayprune.workers.store.layout import PLAN_FILE, SOURCE_TASK, Scope

T = TypeVar("T")


def state_of(file: Path) -> str:
    """What changes whenever a file is written, replaced or renamed, though its size and its time of
    writing may be what they were.
    """
    try:
        stat = file.stat()
    except OSError as error:
        return str(error.strerror)
    return f"{stat.st_size} bytes, inode {stat.st_ino}, changed at {stat.st_ctime_ns} ns"


@dataclass
class Watched:
    """Files that a run reads again and again."""

    states: dict[Path, str]
    """Their states (`state_of`) when what they hold was digested."""
    is_same: Callable[["Context"], bool]
    """Digests it again: whether it is the same. It holds no context, which holds it."""


def nothing_before() -> None:
    """What has to succeed before a stale task is removed: nothing."""


@dataclass(frozen=True)
class Context:
    """The job, its folder, and the workers, for one pass over a model."""

    job: JobSpec
    folder: RunFolder
    executor: Executor
    show: Callable[[dict[str, Any]], object]
    scope: Scope
    store: TaskStore | None = None
    """Where finished tasks of other runs are found, and those of this one kept."""
    memory: PeakMemory = field(default_factory=PeakMemory)
    watched: list["Watched"] = field(default_factory=list)
    """The model's files, once their values are digested."""

    def record(self, plan: Plan) -> Plan:
        """Write a plan down."""
        write_json(self.scope.about / PLAN_FILE, plan.document())
        return plan

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event and show it."""
        scope = {"scope": self.scope.name} if self.scope.name else {}
        record = {"event": event} | scope | fields
        self.folder.emit(record)
        self.executor.follow(record)
        self.show(record)

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Mark the beginning and end of a stage of so many steps."""
        start, before = time.monotonic(), self.executor.busy_seconds.copy()
        self.emit("stage-started", stage=name, steps=steps)
        yield
        busy = self.executor.busy_seconds
        self.emit(
            "stage-finished",
            stage=name,
            steps=steps,
            seconds=time.monotonic() - start,
            busy_seconds={worker: busy[worker] - before.get(worker, 0.0) for worker in busy},
            peak_memory_bytes=self.peak_memory_bytes(),
        )

    def layer_finished(
        self,
        stage: str,
        layer: int,
        seconds: float,
        steps: Mapping[str, float],
        groups: Mapping[str, object],
    ) -> None:
        """Report that a stage has done a layer in so many seconds, those of its steps (of all
        workers together), and what was decided about its groups.
        """
        self.emit(
            "step-finished",
            stage=stage,
            layer=layer,
            seconds=seconds,
            steps=steps,
            groups=groups,
            peak_memory_bytes=self.peak_memory_bytes(),
        )

    def peak_memory_bytes(self) -> dict[str, int]:
        """Peak private memory of the driver and of every worker that has answered, in bytes."""
        return {"driver": self.memory.bytes} | self.executor.peak_memory_bytes

    def task(self, name: str, inputs: Mapping[str, object], computed_on: str | None = None) -> Task:
        """A task of this pass, with the options that it reads; `computed_on` where it is not
        computed as the workers' other steps are.
        """
        if computed_on is None and kind_of(name) not in WITHOUT_ACTIVATIONS:
            computed_on = self.executor.computed_on
        options = options_read(self.job, name)
        return self.folder.task(name, self.scope, options, inputs, computed_on)

    def check_source(self) -> None:
        """Check that the model still holds the values that were digested, where somebody has
        touched its files since.

        Raises:
            VerificationError: it holds others.
        """
        for watched in self.watched:
            if touched := [f for f, state in watched.states.items() if state_of(f) != state]:
                states = {file: state_of(file) for file in watched.states}
                if not watched.is_same(self):
                    raise VerificationError(
                        f"{touched[0]}: was changed while this run read it; what was computed"
                        " meanwhile is not kept: run the same command again once the model stays"
                        " as it is"
                    )
                watched.states = states

    def finished(
        self, task: Task, before_redoing: Callable[[], None] = nothing_before
    ) -> Manifest | None:
        """The manifest of a task that is done; None when it has to be done (again, if its files or
        its manifest are damaged, of which an event tells). What is stale is removed, once
        `before_redoing` has succeeded.

        Raises:
            VerificationError: other software has made it, or another kind of device.
        """
        manifest, name = read_manifest(task.folder), self.scope.task(task.name)
        if manifest and (changes := self.folder.changes(manifest, task)):
            before_redoing()
            self.emit("task-stale", task=name, changed=changes)
            if task.name != SOURCE_TASK:  # its files were touched; what they hold is looked at next
                forget_report(self.folder.path)
            remove_task(task.folder)
            manifest = None
        elif damaged := self._damaged(task, manifest):
            self.emit("task-damaged", task=name, files=damaged)
            forget_report(self.folder.path)
            (task.folder / MANIFEST_NAME).unlink(missing_ok=True)
            manifest = None
        if manifest:
            return manifest
        kept = kind_of(task.name) in KEPT_IN_STORE
        if self.store and kept and (manifest := self.store.fetch(task)):
            self.emit("task-fetched", task=name)
            return manifest
        return None

    @staticmethod
    def _damaged(task: Task, manifest: Manifest | None) -> list[str]:
        """What of a task is not as it was written."""
        if manifest is None:
            return [MANIFEST_NAME] if (task.folder / MANIFEST_NAME).is_file() else []
        return damaged_files(task.folder, manifest)

    def once(
        self,
        task: Task,
        work: Callable[[], object],
        before_redoing: Callable[[], None] = nothing_before,
    ) -> Manifest:
        """The manifest of a task, after doing its work unless it is done already.

        Raises:
            VerificationError: other software has made it, or another kind of device.
            ResourceError: the failure policy says stop.
        """
        if done := self.finished(task, before_redoing):
            self.emit("task-found", task=self.scope.task(task.name))
            return done
        self.attempt(task.name, work)
        return self.done(task)

    def done(self, task: Task) -> Manifest:
        """The manifest of a task whose work has just ended.

        Raises:
            VerificationError: the model was changed meanwhile; the task is removed.
        """
        try:
            self.check_source()
        except VerificationError:
            remove_task(task.folder)
            raise
        manifest = read_manifest(task.folder)
        assert manifest is not None, f"{task.name} left no manifest"
        for text in self.executor.warned():
            self.emit("warning", text=text)
        self.folder.emit({"event": "task-done", "task": self.scope.task(task.name)})
        if self.store and kind_of(task.name) in KEPT_IN_STORE:
            self.store.keep(task, manifest)
        return manifest

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
                self._agree()
                return work()
            except WorkerFailure as error:
                failed += 1
                decision = decide(error.failure, failed, self.job.parallel.retries)
                self.emit("worker-failed", task=task, detail=str(error), decision=decision.value)
                if decision is Decision.STOP:
                    raise stopping_error(error, task, failed) from None

    def _agree(self) -> None:
        """See that workers compute as finished tasks were, where that was taken for granted.

        Raises:
            SpecError: they do not.
        """
        taken = self.executor.computed_on
        if taken is not None and (found := self.executor.how_computed()) != taken:
            raise SpecError(
                f"{self.scope.run}: finished tasks were computed on {taken}, workers now compute on"
                f" {found}; set parallel.device and model.dtype as they were, or give --redo stale"
            )
