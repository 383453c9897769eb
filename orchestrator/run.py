"""The story of a job: plan, start, tokenise, measure gradients, choose the shape, sweep, export,
evaluate, report.
"""

import importlib
import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.executor import Executor, InProcessExecutor, MemoryOn
from rayprune.orchestrator.execution.run_folder import RunFolder
from rayprune.orchestrator.planning.disk import still_needed
from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.reporting.gather import write_report
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.stages import (
    evaluation,
    export,
    gradients,
    probe,
    start,
    sweep,
    texts,
    training,
)
from rayprune.orchestrator.stages.context import Context
from rayprune.specs.errors import ResourceError
from rayprune.specs.job import JobSpec
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import CACHE, task_folder

Show = Callable[[dict[str, Any]], object]


def run_job(job: JobSpec, out: Path, show: Show) -> Report:
    """Run a job to its end, or go on where an earlier attempt stopped; returns the report.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    checkpoint = open_checkpoint(Path(job.model.path))
    plan = first_plan(job, checkpoint)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, job))
        executor = stack.enter_context(
            make_executor(
                job, folder.path, lambda device: settle_on(context, checkpoint, device).memory
            )
        )
        context = Context(job, checkpoint, plan, folder, executor, show)
        context.emit(
            "run-started",
            job=str(folder.path),
            workers=executor.num_workers,
            executor=job.cluster.executor,
        )
        for warning in plan.warnings:
            context.emit("warning", text=warning)
        _check_disk(folder.path, plan)
        _check_packages(job)
        context.settle(plan)
        start.start(context)
        tokens, evaluated = texts.tokenize(context)
        context.gradients = gradients.measure_gradients(context, tokens)
        context.settle(plan.chosen(probe.choose_shape(context, tokens)))
        training.train_first(context, tokens)
        layers = sweep.prune_layers(context, tokens)
        exported = export.export_model(context, layers)
        recovered = training.recover(context, exported)
        # it only serves what is not finished
        shutil.rmtree(folder.path / CACHE, ignore_errors=True)
        losses = evaluation.evaluate(context, exported, recovered, evaluated)
        context.emit("run-finished")
        return write_report(context, layers, losses)


def first_plan(job: JobSpec, checkpoint: Checkpoint) -> Plan:
    """The plan before the workers' device is known: `auto` counts as a CPU, or as a GPU where only
    that will do.

    Raises:
        RaypruneError: as `make_plan` says.
    """
    try:
        return make_plan(job, checkpoint)
    except ResourceError:
        if job.parallel.device == "auto":
            with suppress(ResourceError):
                return make_plan(job, checkpoint, device="cuda")
        raise


def settle_on(context: Context, checkpoint: Checkpoint, device: str) -> Plan:
    """The plan for the device that the workers turned out to have, made again if it is another
    one.

    Raises:
        ResourceError: a worker needs more memory there than it may use.
    """
    if context.plan.device != device:
        plan, shapes = make_plan(context.job, checkpoint, device=device), context.plan.shapes
        context.settle(replace(plan, shapes=shapes))
    return context.plan


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


def _check_packages(job: JobSpec) -> None:
    """Miss what a training needs now, not after hours of other work."""
    try:
        if job.trains_on_ranks and job.cluster.executor == "ray":
            importlib.import_module("ray.train")
        # importing it would import torch
        if job.recover and job.recover.lora and importlib.util.find_spec("peft") is None:
            raise ImportError("no module named peft")
    except ImportError as error:
        raise ResourceError(
            f"packages for training are missing ({error}); install rayprune with its extra 'train'"
        ) from None


def _check_disk(path: Path, plan: Plan) -> None:
    """Miss room for the models and states that are yet to be written now, not after hours.

    Raises:
        ResourceError: there is less.
    """
    tasks = [need.task for need in plan.disk]
    finished = {task for task in tasks if read_manifest(task_folder(path, task))}
    needed, free = still_needed(plan.disk, finished), shutil.disk_usage(path).free
    if free < needed:
        left = ", ".join(task for task in tasks if task not in finished)
        raise ResourceError(
            f"{path}: what is yet to be written ({left}) needs {needed} bytes, {free} are free;"
            " choose another --out"
        )
