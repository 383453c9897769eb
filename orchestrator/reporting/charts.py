"""Drawings of pages: matplotlib's SVG, inlined, in the page's own colours and font.

matplotlib takes a second to import, and so it is imported where something is drawn. A drawing is
narrow enough for a telephone; the page puts two beside each other where there is room. Its title
and description are for those who cannot see it: tables have the values.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import StringIO
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

from rayprune.orchestrator.reporting.tables import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 460, 250
"""Of a drawing, in CSS pixels."""
COLOURS = {
    "text": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "page": "#040404",
    "training": "#050505",
    "held-out": "#060606",
}
"""Of things, as matplotlib is told; in the page they are the variables of these names."""
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are text
    "font.size": 12,
    "text.color": COLOURS["text"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.left": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
MARKED = 64
"""So many points of a line at most are marked one by one."""


def layers_drawing(
    name: str,
    title: str,
    kept: Mapping[int, tuple[int, int]],
    errors: Mapping[str, Mapping[int, float]],
    num_layers: int,
) -> str:
    """Units that stay of a group in every layer, of how many, and below both output errors; a layer
    where the group was left alone has no error, and keeps all.
    """
    whole = max((of for _, of in kept.values()), default=1)
    numbers = range(num_layers)
    stays, of = zip(*(kept.get(number, (whole, whole)) for number in numbers), strict=True)

    def paint(upper: "Axes", lower: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        upper.bar(numbers, of, width=0.85, color=COLOURS["line"])
        upper.bar(numbers, stays, width=0.85, color=COLOURS["held-out"])
        upper.set_title(f"{title}: kept")
        upper.set_ylim(0, whole * 1.05)
        upper.grid(visible=False)
        for series, values in errors.items():
            _line(lower, numbers, [values.get(number, math.nan) for number in numbers], series)
        lower.set_title(f"{title}: output error", pad=18)
        lower.set_ylim(bottom=0)
        lower.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        lower.set_xlabel("layer")
        for axes in (upper, lower):
            axes.set_xlim(-0.8, num_layers - 0.2)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    fewest, most = min(stays), max(stays)
    amounts = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    worst = max((value for values in errors.values() for value in values.values()), default=0.0)
    told = f"{amounts} of {whole:,} stay; the largest error is {worst:.4g}"
    return _drawn(name, f"{title} by layer", told, paint, rows=(2, 3), height=HEIGHT + 90)


def curve(name: str, title: str, axis: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    """One line."""

    def paint(axes: "Axes") -> None:
        _line(axes, xs, ys, "held-out")
        axes.set_title(title)
        axes.set_xlabel(axis)

    told = f"from {ys[0]:.4g} to {ys[-1]:.4g}, least {min(ys):.4g}, most {max(ys):.4g}"
    return _drawn(name, title, told, paint)


def timeline_drawing(
    name: str, title: str, rows: Mapping[str, Sequence[tuple[float, float, float]]]
) -> str:
    """A row of bars for each name: where each begins, how long it is, and which part of it is
    filled.
    """

    def paint(axes: "Axes") -> None:
        for place, bars in enumerate(rows.values()):
            whole = [(start, length) for start, length, _ in bars]
            filled = [(start, length * part) for start, length, part in bars]
            row, edge = (place - 0.35, 0.7), COLOURS["page"]
            axes.broken_barh(whole, row, facecolor=COLOURS["line"], edgecolor=edge, linewidth=0.5)
            axes.broken_barh(filled, row, facecolor=COLOURS["held-out"])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("seconds")

    return _drawn(name, title, ", ".join(rows), paint, height=70 + 24 * len(rows))


def frontier_drawing(
    name: str, points: Mapping[str, tuple[float, float]], best: Sequence[str]
) -> str:
    """Percent removed and perplexity ratios by name; a line joins the best, which are filled; none
    is where they cannot be compared.
    """

    def paint(axes: "Axes") -> None:
        line = [points[each] for each in best]
        axes.plot([x for x, _ in line], [y for _, y in line], color=COLOURS["held-out"])
        middle = fmean(x for x, _ in points.values())
        for each, (x, y) in points.items():
            series = "held-out" if each in best else "training"
            face = COLOURS[series] if each in best else COLOURS["page"]
            axes.plot([x], [y], "o", markersize=6, color=COLOURS[series], markerfacecolor=face)
            # right of it and below, or left and above: the line rises, and names stay inside
            at, side = ((7, -12), "left") if x < middle else ((-7, 5), "right")
            axes.annotate(each, (x, y), xytext=at, textcoords="offset points", ha=side, fontsize=10)
        axes.margins(0.15)
        axes.set_title("perplexity, times the dense model's")
        axes.set_xlabel("percent of the decoder's parameters removed")

    told = (
        "Filled: no other run is smaller and as good, or as small and better; a line joins them."
        " Open: another one is. The table has the values."
        if best
        else "None is better than another: they were measured in different ways."
    )
    return _drawn(name, "Perplexity by size", told, paint, height=HEIGHT + 60)


def _line(axes: "Axes", xs: Sequence[float], ys: Sequence[float], series: str) -> None:
    """A solid line with filled points; that of the training is dashed, with open ones."""
    is_training = series == "training"
    axes.plot(
        xs,
        ys,
        "--" if is_training else "-",
        label=series,
        color=COLOURS[series],
        marker="o" if len(xs) <= MARKED else None,
        markersize=3.5,
        markerfacecolor=COLOURS["page" if is_training else series],
    )


@cache
def _import_matplotlib() -> None:
    """Import it without what it would read of, and write into, the user's home."""
    asked = os.environ.get("MPLCONFIGDIR")
    with TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            import matplotlib.font_manager  # noqa: F401
        finally:
            del os.environ["MPLCONFIGDIR"]
            if asked is not None:
                os.environ["MPLCONFIGDIR"] = asked


def _drawn(
    name: str,
    title: str,
    description: str,
    paint: Callable[..., None],
    rows: Sequence[int] = (1,),
    height: int = HEIGHT,
) -> str:
    """A drawing as a part of the page, where `name` is its own: panels of these heights, one below
    the other, that `paint` is given.
    """
    _import_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name, written = re.sub(r"\W+", "-", name), StringIO()
    with rc_context(SETTINGS | {"svg.hashsalt": name}), catch_warnings():
        simplefilter("ignore")  # about letters that matplotlib's font has not: the page's has them
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        grid = figure.add_gridspec(len(rows), height_ratios=rows)
        paint(*(figure.add_subplot(grid[row, 0]) for row in range(len(rows))))
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    head = f'<title id="{name}-title">{text(title)}</title>'
    head += f'<desc id="{name}-desc">{text(description)}</desc>'
    labels = f'aria-labelledby="{name}-title" aria-describedby="{name}-desc"'
    box = f'viewBox="0 0 {WIDTH} {height}"'
    body = _inlined(written.getvalue(), name)
    return f'<figure><svg role="img" {box} {labels}>{head}{body}</svg></figure>'


def _inlined(drawing: str, name: str) -> str:
    """What is inside a drawing of matplotlib's, as a part of a page: no style of its own, the
    page's colours and font, and identifiers that no other drawing has.
    """
    body = drawing[drawing.index(">", drawing.index("<svg")) + 1 : drawing.rindex("</svg>")]
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"font: (?:\w+ )*([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    return body
