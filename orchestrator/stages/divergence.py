"""Divergences of whole models from the dense one, measured by all workers, each on its part of the
windows; every calibration text by itself.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayprune.orchestrator.planning.workload import CANDIDATES_AT_ONCE
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.spread import Spread
from rayprune.specs.allocation import CurvesAllocation
from rayprune.specs.calibration import CalibrationSpec
from rayprune.workers.store.files import Task, commit
from rayprune.workers.texts.limits import spread_windows


def measure_alone(
    context: Context, num_layers: int, alone: Sequence[tuple[int, str, int]], task: Task
) -> None:
    """Measure what it costs to cut one group of one layer to so many units, for each of `alone`,
    and record it: a number, or where there are several texts one for each.
    """
    candidates: list[Spread] = [
        [{name: count} if index == layer else {} for index in range(num_layers)]
        for layer, name, count in alone
    ]
    with context.stage("sensitivity", math.ceil(len(candidates) / CANDIDATES_AT_ONCE)):
        found = measured(context, candidates, "sensitivity")
    result = [each if len(each) > 1 else each[0] for each in found]
    commit(task, [], {"result": result, "computed_on": context.executor.computed_on})


def every_text(measured: Any) -> list[float]:
    """What was recorded: a number, where there is one text."""
    return measured if isinstance(measured, list) else [measured]


def objective(allocation: CurvesAllocation, by_text: Sequence[float]) -> float:
    """What counts of the divergences on several texts; of one, that."""
    return max(by_text) if allocation.objective == "max" else math.fsum(by_text) / len(by_text)


def text_names(calibration: CalibrationSpec) -> list[str]:
    """What calibration texts are called: by the names of their files where these differ."""
    paths = [text.path for text in calibration.texts]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [f"{n}: {p}" for n, p in enumerate(paths, 1)]


def measured(context: Context, candidates: Sequence[Spread], stage: str) -> list[list[float]]:
    """The divergence from the dense model (nats per token) of every candidate, on every text; the
    same for any number of workers.
    """
    executor, found = context.executor, list[list[float]]()
    count, calibration = context.job.divergence_windows, context.job.calibration
    of_text = [text for _, text in spread_windows(calibration, count)]
    for start in range(0, len(candidates), CANDIDATES_AT_ONCE):
        some = candidates[start : start + CANDIDATES_AT_ONCE]
        calls = [
            executor.on(worker).divergences(some, owned) for worker, owned in executor.shares(count)
        ]
        sums = [receipt["sums"] for receipt in executor.wait(calls)]
        for index in range(len(some)):
            values = [value for part in sums for value in part[index]]
            by_text: list[list[float]] = [[] for _ in calibration.texts]
            for text, value in zip(of_text, values, strict=True):
                by_text[text].append(value)
            length = calibration.sequence_length
            found.append([math.fsum(each) / (len(each) * length) for each in by_text])
        context.emit(
            "candidates-measured",
            stage=stage,
            done=len(found),
            of=len(candidates),
            peak_memory_bytes=context.peak_memory_bytes(),
        )
    return found
