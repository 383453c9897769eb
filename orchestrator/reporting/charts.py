"""Drawings of the HTML report: static SVG with a title and a description, on one scale of ticks."""

from collections.abc import Iterable, Sequence
from math import ceil, floor, log10

from rayprune.orchestrator.reporting.tables import text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 250, 58, 10, 30, 42  # of a panel, and its margins
# of bars: room for names and for values, height of a line
BAR_LEFT, BAR_RIGHT, BAR_STEP = 110, 150, 30


def label(x: float, y: float, style: str, content: object) -> str:
    """Text in a drawing."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{text(content)}</text>'


def svg(name: str, title: str, description: str, height: float, parts: Iterable[str]) -> str:
    """A drawing; `name` is its own on the page."""
    name = text(name)
    labels = (
        f'<title id="{name}-title">{text(title)}</title><desc'
        f' id="{name}-desc">{text(description)}</desc>'
    )
    attributes = (
        f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc" viewBox="0 0'
        f' {WIDTH} {height}"'
    )
    return f"<figure><svg {attributes}>{labels}{''.join(parts)}</svg></figure>"


def ticks(least: float, largest: float, most: int) -> list[float]:
    """From at most `least` to at least `largest` in steps of 1, 2 or 5 times a power of ten."""
    span = (largest - least) or abs(largest) or 1.0
    scale = 10.0 ** floor(log10(span / most))
    step = next(
        factor * scale for factor in (1, 2, 5, 10) if factor * scale * most >= span * (1 - 1e-9)
    )
    first, last = floor(least / step + 1e-9), ceil(largest / step - 1e-9)
    return [step * number for number in range(first, max(first + 1, last) + 1)]


def height(value: float, marks: Sequence[float]) -> float:
    """Where a value stands in a panel with these ticks."""
    return HEIGHT - BOTTOM - (value - marks[0]) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)


def places(count: int) -> list[float]:
    """The middles of so many equal parts of a panel's width."""
    return [LEFT + (WIDTH - LEFT - RIGHT) / count * (index + 0.5) for index in range(count)]


def frame(names: Sequence[object], axis: str, marks: Sequence[float]) -> str:
    """What is around the lines: horizontal rules with their values, some of the names below, the
    axis' name.
    """
    every = max(1, round(ticks(0, len(names), 20)[1]))
    parts = [label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", axis)]
    parts += [
        label(x, HEIGHT - BOTTOM + 18, "middle", name)
        for x, name in list(zip(places(len(names)), names, strict=True))[::every]
    ]
    for mark in marks:
        parts.append(f'<path class="grid" d="M{LEFT} {height(mark, marks):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(label(LEFT - 8, height(mark, marks) + 4, "end", f"{mark:.4g}"))
    return "".join(parts)


def line(points: Sequence[tuple[float, float] | None]) -> str:
    """The path through the points, broken at gaps."""
    pairs = zip([None, *points], points, strict=False)
    return "".join(
        f"{'L' if last else 'M'}{place[0]:.1f} {place[1]:.1f}" for last, place in pairs if place
    )


def point(place: tuple[float, float], style: str, radius: float, hint: str) -> str:
    """A circle that says what it stands for."""
    return (
        f'<circle class="{style}" cx="{place[0]:.1f}" cy="{place[1]:.1f}"'
        f' r="{radius:.1f}"><title>{text(hint)}</title></circle>'
    )


def curve(name: str, title: str, values: Sequence[float], axis: str, numbers: Sequence[int]) -> str:
    """One line in a panel of its own: a value for each number."""
    marks = ticks(min(values), max(values), 5)
    path = line(
        [(x, height(value, marks)) for x, value in zip(places(len(values)), values, strict=True)]
    )
    parts = [
        label(0, 15, "name panel", title),
        frame(numbers, axis, marks),
        f'<path class="held-out" d="{path}"/>',
    ]
    return svg(
        name,
        title,
        f"from {values[0]:.4g} to {values[-1]:.4g}, least {min(values):.4g}, most"
        f" {max(values):.4g}",
        HEIGHT,
        parts,
    )


def bars(name: str, title: str, lengths: dict[str, float], hints: dict[str, str]) -> str:
    """A bar and a hint per name."""
    room, parts = WIDTH - BAR_LEFT - BAR_RIGHT, []
    for y, (entry, value) in enumerate(lengths.items()):
        width = max(1.0, room * value / (max(lengths.values()) or 1.0))
        parts.append(label(0, y * BAR_STEP + 20, "name", entry))
        parts.append(
            f'<rect class="bar" x="{BAR_LEFT}" y="{y * BAR_STEP + 6}" width="{width:.1f}"'
            ' height="19"/>'
        )
        parts.append(label(BAR_LEFT + width + 8, y * BAR_STEP + 20, "", hints[entry]))
    return svg(
        name,
        title,
        ", ".join(f"{entry} {hint}" for entry, hint in hints.items()) or "nothing",
        len(lengths) * BAR_STEP + 6,
        parts,
    )
