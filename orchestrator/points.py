"""One job at several settings. Every point is a run of its own; what points share is computed once,
since they keep their tasks in one store.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprune.orchestrator.entry import Progress, run, validate
from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.orchestrator.reporting.comparison import (
    Compared,
    on_frontier,
    recommendation,
    recommended,
    results,
    rule,
    score_tables,
)
from rayprune.orchestrator.reporting.comparison_page import comparison_page
from rayprune.orchestrator.reporting.tables import Part
from rayprune.orchestrator.run import connected_once
from rayprune.specs.errors import RaypruneError, SpecError
from rayprune.specs.grid import grid, varied
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import fingerprint, write_json, write_text

RUNS, STORE = "runs", "store"
SWEEP_FILE, SWEEP_PAGE = "sweep.json", "sweep.html"
Told = Callable[[str], object]


@dataclass(frozen=True)
class Point:
    """A job with its settings, and where it runs."""

    name: str
    job: JobSpec
    out: Path


def points_of(source: Path | Mapping[str, Any], overrides: Sequence[str], out: Path) -> list[Point]:
    """The points that overrides with several values describe; all of them are checked as a run
    checks its job first.

    Raises:
        SpecError: overrides or a point's job are wrong.
        RaypruneError: as `rayprune.validate` says; it begins with the point's name.
    """
    fields, points = varied(overrides), []
    for settings in grid(overrides):
        name = ", ".join(
            setting for setting in settings if setting.partition("=")[0].strip() in fields
        )
        name = name or ", ".join(settings) or "the job as it is"
        points.append(Point(name, load_job(source, settings), out / RUNS / _folder(name)))
    for point in points:
        try:
            validate(point.job, point.out)
        except RaypruneError as error:
            raise type(error)(f"{point.name}: {error}") from error
    return points


def _folder(name: str) -> str:
    """A name that file systems take; names that differ give different ones."""
    plain = re.sub(r"[^\w.=,-]+", "_", name)[:120]
    return plain if plain.replace("_", " ") == name else f"{plain}-{fingerprint(name)[:8]}"


def sweep(
    points: Sequence[Point], out: Path, within: float, progress: Progress, told: Told
) -> list[Compared]:
    """Run the points one after the other, or go on; after each, sweep.json and sweep.html tell of
    those that are finished.

    Args:
        points: from `points_of`, with the same `out`.
        out: folder of the runs, of the store they share, and of what is written of them.
        within: the perplexity that a model to recommend has at most, times the dense model's.
        progress: as `rayprune.run` takes it.
        told: is given a line when a point begins.

    Raises:
        RaypruneError: from the first point that fails; finished ones, and its finished tasks, are
            kept.
    """
    if not within > 0:
        raise SpecError(f"--within {within:g}: must be larger than 0, such as 1.2")
    finished: list[Compared] = []
    if all(point.job.evaluation is None for point in points):
        told("no quality is measured, and none recommended: the job has no evaluation")
    left = [point.job for point in points if not (point.out / REPORT_FILE).exists()]
    with connected_once(left):
        for number, point in enumerate(points, 1):
            told(f"point {number} of {len(points)}: {point.name}")
            report = run(point.job, point.out, progress, store=out / STORE)
            finished.append(Compared(point.name, report))
            _write(finished, len(points), out, within)
    return finished


def summary(runs: Sequence[Compared], out: Path, within: float) -> Iterator[Part]:
    """What came of a sweep."""
    yield results(runs)
    yield from score_tables(runs)
    yield recommendation(runs, within)
    yield f"sweep: {out / SWEEP_FILE}, {out / SWEEP_PAGE}"


def _write(runs: Sequence[Compared], of: int, out: Path, within: float) -> None:
    best, frontier = recommended(runs, within), on_frontier(runs)
    content = {
        "schema_version": 1,
        "points": of,
        "rule": rule(within),
        "recommended": best.name if best else None,
        "runs": [
            {
                "name": each.name,
                "run": each.report.run.relative_to(out.absolute()).as_posix(),
                "removed": each.removed,
                "perplexity_ratio": each.perplexity,
                "on_frontier": each in frontier,
                "report": each.report.to_dict(),
            }
            for each in runs
        ],
    }
    write_json(out / SWEEP_FILE, content)
    lead = f"{len(runs)} of {of} points. {recommendation(runs, within)}"
    models = dict.fromkeys(each.report.dense.name for each in runs if each.report.dense)
    title = f"Sweep of {', '.join(models)}"
    write_text(out / SWEEP_PAGE, comparison_page(title, lead, runs, out))
