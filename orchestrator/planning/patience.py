"""After how long without progress a worker counts as hung: long after any step of the plan ends."""

from collections.abc import Iterator
from pathlib import Path

from rayprune.orchestrator.planning.disk import BEST_BYTES, STATE_BYTES
from rayprune.orchestrator.planning.plan import Plan
from rayprune.specs.job import JobSpec
from rayprune.specs.texts import WindowsSpec
from rayprune.specs.training import RecoverSpec
from rayprune.workers.store.layout import RECOVER_TASK

LEAST_SECONDS = 600.0
SLOWEST = {"cpu": 4e9, "cuda": 4e11}
"""Floating-point operations in a second that every worker reaches, beside other work too."""
SLOWEST_DISK = 10e6
"""Bytes in a second."""
SLOWEST_TEXT = 1e5
"""Bytes of text in a second, tokenised."""
PASSES = 5
"""Of a token in a training: forward, maybe twice, backward, which counts twice, and a teacher's."""


def step_limit(job: JobSpec, plan: Plan) -> float:
    """`parallel.step_seconds`; `auto`: all of a worker's work in one step, on the slowest machine.

    After a loss one step may replay all layers, so no smaller part of the work is a bound. Of a
    recovery by ranks, which logs every step of its own, it is one of these.
    """
    if job.parallel.step_seconds != "auto":
        return float(job.parallel.step_seconds)
    text_bytes = sum(map(_size, _texts(job)))
    tokens = text_bytes if job.evaluation else 0  # a token has a byte at least
    by_ranks = job.recover if job.recover and job.recover.scope == "model" else None
    stages = [stage for stage in plan.stages if not (by_ranks and stage.name == RECOVER_TASK)]
    if by_ranks:
        tokens += PASSES * _between_lines(by_ranks, job.recovery_text)
    flops = sum(stage.flops for stage in stages) + 2 * plan.model.active_parameters * tokens
    read = plan.model.bytes_on_disk
    if job.trains_on_ranks:
        read += (STATE_BYTES + BEST_BYTES) * plan.model.parameters
    return (
        LEAST_SECONDS
        + flops / plan.workers / SLOWEST[plan.device]
        + read / SLOWEST_DISK
        + text_bytes / SLOWEST_TEXT
    )


def _between_lines(spec: RecoverSpec, text: WindowsSpec) -> int:
    """Tokens of a step, and of what is measured behind it."""
    measured = (len(text.texts) + 1) * spec.held_out.windows if spec.held_out else 0
    return text.sequence_length * (spec.batch + measured)


def _texts(job: JobSpec) -> Iterator[Path]:
    trained = job.recover.text if job.recover else None
    windows = [job.calibration, *([trained] if trained else [])]
    evaluated = job.evaluation.by_name.values() if job.evaluation else ()
    for text in (*(text for spec in windows for text in spec.texts), *evaluated):
        path = Path(text.path)
        yield from path.rglob("*") if path.is_dir() else [path]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
