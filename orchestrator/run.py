"""The story of a job: check, plan, start, prune in one pass or in several, report."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.executor import Executor, InProcessExecutor, MemoryOn
from rayprune.orchestrator.execution.run_folder import RunFolder
from rayprune.orchestrator.execution.task_store import TaskStore
from rayprune.orchestrator.planning.causal import check_encoder
from rayprune.orchestrator.planning.patience import step_limit
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.preflight import Checked, check_job, check_own_text
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.reporting.gather import write_report
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.stages import lm_tasks, own_text, start
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.dropping import prune_without_layers
from rayprune.orchestrator.stages.masking import prune_and_mask
from rayprune.orchestrator.stages.prune import prune
from rayprune.orchestrator.stages.steps import prune_in_steps
from rayprune.orchestrator.stages.subject import Pruned
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import dump_job, load_job
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.store.layout import JOB_FILE, PLAN_FILE, Scope

Show = Callable[[dict[str, Any]], object]


def run_job(
    job: JobSpec,
    out: Path,
    show: Show,
    redo_stale: bool = False,
    store: Path | None = None,
    checked: Checked | None = None,
) -> Report:
    """Run a job to its end, or go on where an earlier attempt stopped; returns the report.

    With `redo_stale`, what other software or another kind of device has made is done again. In a
    `store` finished tasks of other runs are found, and those of this one kept. The job is checked
    first, unless it is `checked`.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    checked = checked or check_job(job, out)
    checkpoint, plan = checked.checkpoint, checked.plan
    plans = {plan.device: plan}

    def memory_on(device: str) -> MemoryPlan:
        return plan_on(device, plans, job, checkpoint).memory

    with _started(job, out, show, memory_on, redo_stale, store) as context:
        executor = context.executor
        executor.step_limit = step_limit(job, plan)
        for warning in plan.warnings:
            context.emit("warning", text=warning)
        start.start(context, checkpoint.path)
        lm_tasks.open_tasks(context)
        done = _passes(job)(
            context, plan_on(executor.device_kind, plans, job, checkpoint), checkpoint
        )
        context.emit("run-finished", step_seconds=executor.step_seconds)
        return write_report(context, done)


def _passes(job: JobSpec) -> Callable[[Context, Plan, Checkpoint], Pruned]:
    """How many passes over the model a job takes, and which."""
    if job.steps:
        return prune_in_steps
    if job.budget.drop_layers is not None:
        return prune_without_layers
    return prune_and_mask if job.method.cuts_first else prune


def write_own_text(job: JobSpec, out: Path, show: Show) -> Path:
    """Have the model write the text that a job asks for, and nothing else; the file, in the run
    folder, which goes on where an earlier attempt stopped.

    Raises:
        RaypruneError: as its subclasses say; finished batches are kept.
    """
    checkpoint = open_checkpoint(Path(job.model.path))
    if not checkpoint.model.causal:
        check_encoder(job)
    check_own_text(job, checkpoint)
    known = (out / PLAN_FILE).exists() and (out / JOB_FILE).exists()
    if known and dump_job(load_job(out / JOB_FILE)) != dump_job(job):
        raise SpecError(f"{out}: holds a run of another job; choose another --out")
    with _started(job, out, show, lambda _: MemoryPlan(), False, None) as context:
        start.start(context, checkpoint.path)
        context.executor.use_model(job, checkpoint.path, context.scope.name)
        return own_text.write_own_text(context, checkpoint)


@contextmanager
def _started(
    job: JobSpec, out: Path, show: Show, memory_on: MemoryOn, redo_stale: bool, store: Path | None
) -> Iterator[Context]:
    """A run's folder and executor, as long as they are needed."""
    with (
        RunFolder(out, job, redo_stale) as folder,
        make_executor(job, folder.path, memory_on) as executor,
    ):
        tasks = TaskStore(store) if store else None
        context = Context(job, folder, executor, show, Scope(folder.path), tasks)
        context.emit(
            "run-started",
            job=str(folder.path),
            workers=executor.num_workers,
            executor=job.cluster.executor,
        )
        yield context


def plan_on(device: str, plans: dict[str, Plan], job: JobSpec, checkpoint: Checkpoint) -> Plan:
    """The plan for the device that the workers turned out to have; made, unless it is among `plans`
    by device.

    Raises:
        ResourceError: a worker needs more memory there than it may use.
    """
    if device not in plans:
        notes = [note for plan in plans.values() for note in plan.notes]
        plans[device] = plan_job(job, checkpoint, device=device).noting(notes)
    return plans[device]


def make_executor(job: JobSpec, run_folder: Path, memory_on: MemoryOn) -> Executor:
    """The executor a job asks for; Ray is imported only when it is used."""
    if job.cluster.executor == "in-process":
        return InProcessExecutor(job, run_folder, memory_on)
    _secure_local_ray(job)
    from rayprune.orchestrator.execution.ray_executor import RayExecutor

    return RayExecutor(job, run_folder, memory_on)


@contextmanager
def connected_once(jobs: Sequence[JobSpec]) -> Iterator[None]:
    """Over several runs Ray and its workers begin once, where all runs use the same Ray.

    Raises:
        SpecError, ResourceError: Ray does not begin.
    """
    clusters = [job.cluster for job in jobs if job.cluster.executor == "ray"]
    if len(clusters) < max(2, len(jobs)) or any(each != clusters[0] for each in clusters):
        yield
        return
    _secure_local_ray(jobs[0])
    from rayprune.orchestrator.execution.ray_executor import connected, workers_kept

    with connected(*jobs), workers_kept():
        yield


def _secure_local_ray(job: JobSpec) -> None:
    """Give a private Ray a token of its own; it is read when Ray is imported, and left alone it
    would go to the home folder.
    """
    if job.cluster.address == "local" and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
