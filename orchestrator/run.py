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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.executor import Executor, InProcessExecutor
from rayprune.orchestrator.execution.run_folder import RunFolder
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
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.layout import CACHE

Show = Callable[[dict[str, Any]], object]


def run_job(job: JobSpec, out: Path, show: Show) -> Report:
    """Run a job to its end, or go on where an earlier attempt stopped; returns the report.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    checkpoint = open_checkpoint(Path(job.model.path))
    plan = make_plan(job, checkpoint)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, job))
        executor = stack.enter_context(make_executor(job, folder.path, plan))
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


def make_executor(job: JobSpec, run_folder: Path, plan: Plan) -> Executor:
    """The executor a job asks for; Ray is imported only when it is used."""
    if job.cluster.executor == "in-process":
        return InProcessExecutor(job, run_folder, plan.memory)
    if job.cluster.address == "local":
        _secure_local_ray()
    from rayprune.orchestrator.execution.ray_executor import RayExecutor

    return RayExecutor(job, run_folder, plan.memory)


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
    free = shutil.disk_usage(path).free
    if free < plan.output_bytes and not (path / "model").exists():
        raise ResourceError(
            f"{path}: the pruned model needs {plan.output_bytes} bytes, {free} are free; choose"
            " another --out"
        )
