"""The story of a job: plan, start, tokenise, measure gradients, choose the shape, sweep, export,
evaluate, report.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.executor import Executor, InProcessExecutor, MemoryOn
from rayprune.orchestrator.execution.run_folder import RunFolder
from rayprune.orchestrator.execution.task_store import TaskStore
from rayprune.orchestrator.planning.patience import step_limit
from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.planning.preflight import Checked, check_job
from rayprune.orchestrator.reporting.gather import write_report
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.stages import (
    evaluation,
    export,
    formats,
    gradients,
    probe,
    source,
    start,
    sweep,
    texts,
    training,
)
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Pruned, Subject
from rayprune.specs.job import JobSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.layout import Scope

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
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, job, redo_stale))
        plans = {plan.device: plan}
        executor = stack.enter_context(
            make_executor(
                job, folder.path, lambda device: plan_on(device, plans, job, checkpoint).memory
            )
        )
        executor.step_limit = step_limit(job, plan)
        tasks = TaskStore(store) if store else None
        context = Context(job, folder, executor, show, Scope(folder.path), tasks)
        context.emit(
            "run-started",
            job=str(folder.path),
            workers=executor.num_workers,
            executor=job.cluster.executor,
        )
        for warning in plan.warnings:
            context.emit("warning", text=warning)
        start.start(context, checkpoint.path)
        done = prune(context, plan_on(executor.device_kind, plans, job, checkpoint), checkpoint)
        context.emit("run-finished", step_seconds=executor.step_seconds)
        return write_report(context, done)


def prune(context: Context, plan: Plan, checkpoint: Checkpoint) -> Pruned:
    """One pass over a model, in the context's scope: what came of it.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    context.record(plan)
    context.executor.use_model(checkpoint.path, context.scope.name)
    digests = texts.text_digests(context)
    tokens, evaluated, warnings = texts.tokenize(context, checkpoint.path, digests)
    plan = context.record(_noting(context, plan, warnings))
    dense = source.identify(context, checkpoint)
    subject = Subject(plan, dense, tokens, tuple(digests))
    subject = replace(subject, gradients=gradients.measure_gradients(context, subject))
    shape = probe.choose_shape(context, subject)
    subject = replace(subject, plan=context.record(plan.chosen(shape)))
    trained = training.train_first(context, subject)
    layers = sweep.prune_layers(context, trained)
    pruned = export.export_model(context, trained, layers)
    recovered = training.recover(context, subject, pruned)
    formats.write_formats(context, recovered or pruned)
    # it only serves what is not finished
    shutil.rmtree(context.scope.cache, ignore_errors=True)
    models = {"before": dense, "after": pruned} | ({"recovered": recovered} if recovered else {})
    losses = evaluation.evaluate(context, models, evaluated)
    final = _noting(context, trained.plan, evaluation.doubts(losses))
    return Pruned(final, dense, pruned, recovered, layers, losses)


def _noting(context: Context, plan: Plan, warnings: Sequence[str]) -> Plan:
    """The plan with warnings; those that are new are shown."""
    for warning in warnings:
        if warning not in plan.notes:
            context.emit("warning", text=warning)
    return plan.noting(warnings)


def plan_on(device: str, plans: dict[str, Plan], job: JobSpec, checkpoint: Checkpoint) -> Plan:
    """The plan for the device that the workers turned out to have; made, unless it is among `plans`
    by device.

    Raises:
        ResourceError: a worker needs more memory there than it may use.
    """
    if device not in plans:
        notes = [note for plan in plans.values() for note in plan.notes]
        plans[device] = make_plan(job, checkpoint, device=device).noting(notes)
    return plans[device]


def make_executor(job: JobSpec, run_folder: Path, memory_on: MemoryOn) -> Executor:
    """The executor a job asks for; Ray is imported only when it is used."""
    if job.cluster.executor == "in-process":
        return InProcessExecutor(job, run_folder, memory_on)
    if job.cluster.address == "local":
        _secure_local_ray()
    from rayprune.orchestrator.execution.ray_executor import RayExecutor

    return RayExecutor(job, run_folder, memory_on)


def _secure_local_ray() -> None:
    """Give a private Ray a token of its own; it is read when Ray is imported, and left alone it
    would go to the home folder.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
