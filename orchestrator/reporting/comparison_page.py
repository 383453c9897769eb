"""Several runs side by side as one static HTML page."""

from collections.abc import Iterator, Sequence

from rayprune.orchestrator.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    frame,
    height,
    label,
    line,
    point,
    svg,
    ticks,
)
from rayprune.orchestrator.reporting.comparison import (
    Compared,
    job_differences,
    layers,
    on_frontier,
    protocols,
    results,
)
from rayprune.orchestrator.reporting.page import page
from rayprune.orchestrator.reporting.tables import Table, html_table, text

STEPS = 10
"""Of the axis of sizes."""


def comparison_page(title: str, lead: str, runs: Sequence[Compared]) -> str:
    """The whole page; `lead` is its first sentence. Everything in it that is text is escaped."""
    return page(text(title), _body(title, lead, runs))


def _body(title: str, lead: str, runs: Sequence[Compared]) -> Iterator[str]:
    yield f"<header><h1>{text(title)}</h1><p>{text(lead)}</p></header>"
    if measured := [run for run in runs if run.perplexity is not None]:
        yield f"<h2>Size and quality</h2>{_scatter(measured)}"
    yield _table(results(runs), "wide")
    yield from (f"<p>{text(words)}</p>" for words in protocols(runs))
    yield "<h2>Jobs</h2>"
    yield from (f"<p>{text(words)}</p>" for words in job_differences(runs))
    yield "<h2>Kept in every layer</h2>"
    yield from (f"<h3>{text(table.title)}</h3>{_table(table, 'wide')}" for table in layers(runs))


def _table(table: Table, style: str) -> str:
    return html_table(table.title, style, table.columns, table.rows)


def _scatter(runs: Sequence[Compared]) -> str:
    """A point for each run, a line through those that no other beats."""
    sizes = ticks(0, max(0.01, *(run.removed for run in runs)), STEPS)
    ratios = [1.0, *(run.perplexity or 1.0 for run in runs)]
    marks = ticks(min(ratios), max(ratios), 5)
    base = HEIGHT - BOTTOM + 18

    def across(removed: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * removed / sizes[-1]

    def place(run: Compared) -> tuple[float, float]:
        return across(run.removed), height(run.perplexity or 1.0, marks)

    best = on_frontier(runs)
    parts = [
        label(0, 15, "name panel", "perplexity, times the dense model's"),
        frame([], "decoder parameters removed", marks),
        *(label(across(size), base, "middle", f"{size:.0%}") for size in sizes),
        f'<path class="held-out" d="{line([place(run) for run in best])}"/>',
    ]
    for run in runs:
        hint = f"{run.name}: {run.removed:.1%} removed, {run.perplexity:.4f}"
        parts.append(point(place(run), "held-out" if run in best else "training", 4, hint))
    description = (
        "Filled: no other run is smaller and as good, or as small and better; a line joins them."
        " Open: another one is. The table has the values."
    )
    return svg("frontier", "Perplexity by size", description, HEIGHT, parts)
