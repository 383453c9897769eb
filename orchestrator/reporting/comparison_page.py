"""Several runs side by side as one static HTML page."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from rayprune.orchestrator.execution.run_folder import PAGE_FILE
from rayprune.orchestrator.reporting.charts import frontier_drawing
from rayprune.orchestrator.reporting.comparison import (
    Compared,
    job_differences,
    layers,
    on_frontier,
    protocols,
    results,
    score_tables,
)
from rayprune.orchestrator.reporting.page import page, wide_table
from rayprune.orchestrator.reporting.tables import Table, text


def comparison_page(title: str, lead: str, runs: Sequence[Compared], folder: Path) -> str:
    """The whole page, which will lie in a folder; `lead` is its first sentence. Everything in it
    that is text is escaped.
    """
    return page(text(title), _body(title, lead, runs, folder))


def _body(title: str, lead: str, runs: Sequence[Compared], folder: Path) -> Iterator[str]:
    yield f"<header><h1>{text(title)}</h1><p>{text(lead)}</p></header>"
    if measured := [run for run in runs if run.perplexity is not None]:
        yield f"<h2>Size and quality</h2>{_scatter(measured)}"
    yield _table(results(runs))
    yield f"<p>Reports: {', '.join(_link(run, folder) for run in runs)}.</p>"
    yield from map(_table, score_tables(runs))
    yield from (f"<p>{text(words)}</p>" for words in protocols(runs))
    yield "<h2>Jobs</h2>"
    yield from (f"<p>{text(words)}</p>" for words in job_differences(runs))
    yield "<h2>Kept in every layer</h2>"
    yield from (f"<h3>{text(table.title)}</h3>{_table(table)}" for table in layers(runs))


def _link(run: Compared, folder: Path) -> str:
    report = Path(os.path.relpath(run.report.run / PAGE_FILE, folder.absolute())).as_posix()
    return f'<a href="{text(quote(report))}">{text(run.name)}</a>'


def _table(table: Table) -> str:
    return wide_table(table.title, table.columns, table.rows)


def _scatter(runs: Sequence[Compared]) -> str:
    """A point for each run, a line through those that no other beats."""
    points = {run.name: (100 * run.removed, run.perplexity or 1.0) for run in runs}
    return frontier_drawing("frontier", points, [run.name for run in on_frontier(runs)])
