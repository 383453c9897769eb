"""After how long without progress a worker counts as hung: long after any step of the plan ends."""

from collections.abc import Iterator
from pathlib import Path

from rayprune.orchestrator.planning.plan import Plan
from rayprune.specs.job import JobSpec
from rayprune.workers.store.layout import RECOVER_TASK

LEAST_SECONDS = 600.0
SLOWEST = {"cpu": 4e9, "cuda": 4e11}
"""Floating-point operations in a second that every worker reaches, beside other work too."""
SLOWEST_DISK = 10e6
"""Bytes in a second."""
SLOWEST_TEXT = 1e5
"""Bytes of text in a second, tokenised."""


def step_limit(job: JobSpec, plan: Plan) -> float:
    """`parallel.step_seconds`; `auto`: all of a worker's work in one step, on the slowest machine.

    After a loss one step may replay all layers, so no smaller part of the work is a bound.
    """
    if job.parallel.step_seconds != "auto":
        return float(job.parallel.step_seconds)
    text_bytes = sum(map(_size, _texts(job)))
    tokens = text_bytes if job.evaluation else 0  # a token has a byte at least
    # a recovery of the whole model is no step: ranks of a gang train
    on_ranks = job.recover is not None and job.recover.scope == "model"
    stages = [stage for stage in plan.stages if not (on_ranks and stage.name == RECOVER_TASK)]
    flops = sum(stage.flops for stage in stages) + 2 * plan.model.active_parameters * tokens
    return (
        LEAST_SECONDS
        + flops / plan.workers / SLOWEST[plan.device]
        + plan.model.bytes_on_disk / SLOWEST_DISK
        + text_bytes / SLOWEST_TEXT
    )


def _texts(job: JobSpec) -> Iterator[Path]:
    trained = job.recover.text if job.recover else None
    windows = [job.calibration, *([trained] if trained else [])]
    evaluated = job.evaluation.by_name.values() if job.evaluation else ()
    for text in (*(text for spec in windows for text in spec.texts), *evaluated):
        path = Path(text.path)
        yield from path.rglob("*") if path.is_dir() else [path]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
