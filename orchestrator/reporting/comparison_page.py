"""Several runs side by side as one static HTML page."""

from collections.abc import Iterator, Sequence

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


def comparison_page(title: str, lead: str, runs: Sequence[Compared]) -> str:
    """The whole page; `lead` is its first sentence. Everything in it that is text is escaped."""
    return page(text(title), _body(title, lead, runs))


def _body(title: str, lead: str, runs: Sequence[Compared]) -> Iterator[str]:
    yield f"<header><h1>{text(title)}</h1><p>{text(lead)}</p></header>"
    if measured := [run for run in runs if run.perplexity is not None]:
        yield f"<h2>Size and quality</h2>{_scatter(measured)}"
    yield _table(results(runs))
    yield from map(_table, score_tables(runs))
    yield from (f"<p>{text(words)}</p>" for words in protocols(runs))
    yield "<h2>Jobs</h2>"
    yield from (f"<p>{text(words)}</p>" for words in job_differences(runs))
    yield "<h2>Kept in every layer</h2>"
    yield from (f"<h3>{text(table.title)}</h3>{_table(table)}" for table in layers(runs))


def _table(table: Table) -> str:
    return wide_table(table.title, table.columns, table.rows)


def _scatter(runs: Sequence[Compared]) -> str:
    """A point for each run, a line through those that no other beats."""
    points = {run.name: (100 * run.removed, run.perplexity or 1.0) for run in runs}
    return frontier_drawing("frontier", points, [run.name for run in on_frontier(runs)])
