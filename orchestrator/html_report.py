"""A report as one static HTML page: no script, no network, light and dark, printable."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 250, 48, 10, 30, 42  # of a panel, and its margins
BAR_LEFT, BAR_RIGHT, BAR_STEP = 110, 150, 30  # of the stages: room for names and for values, height of a line
SERIES = {"training": "training_error", "held-out": "held_out_error"}
COUNTS = ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1.0, ""))
BYTES = ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --muted: #57606a; --line: #d5dae0; --card: #f6f8fa;
  --training: #a8480b; --held-out: #1a56b0; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e6e9ed; --muted: #a2abb6; --line: #363d46;
  --card: #1d2127; --training: #f0a060; --held-out: #7db0ff; } }
* { box-sizing: border-box; } p, dt, thead th, .exact { color: var(--muted); }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.65rem; line-height: 1.25; } h2 { margin: 2.25rem 0 .4rem; font-size: 1.15rem; } p { margin: .35rem 0; }
h1, p, .names tbody * { overflow-wrap: anywhere; } dd { margin: 0; } .exact { font-size: .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1.5rem 0 .75rem; }
dl div { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 6px; background: var(--card); }
.large { font-size: 1.6rem; font-weight: 600; line-height: 1.3; } figure { margin: .75rem 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 35rem; height: auto; } svg text { fill: var(--muted); font-size: 14px; }
svg .name { fill: var(--text); } svg .panel { font-weight: 600; } .end { text-anchor: end; } .middle { text-anchor: middle; }
path { fill: none; stroke-width: 1.75; stroke-linejoin: round; } .grid { stroke: var(--line); stroke-width: 1; }
.training { stroke: var(--training); stroke-width: 1.5; } path.training { stroke-dasharray: 6 4; } circle.training { fill: var(--page); }
.held-out { stroke: var(--held-out); stroke-width: 1.5; } circle.held-out, .bar { fill: var(--held-out); }
table { border-collapse: collapse; } .wide { width: 100%; } .wide td { white-space: nowrap; }
th, td { padding: .2rem 0 .2rem 1.25rem; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; }
th:first-child { padding-left: 0; } th:first-child, .wide :nth-child(2), .text * { text-align: left; }
@media print { :root { font-size: 12px; } body { max-width: none; padding: 0; font-size: 1rem; } h2 { break-after: avoid; }
  svg { min-width: 0; } svg, tr { break-inside: avoid; } dl { grid-template-columns: repeat(4, 1fr); } * { print-color-adjust: exact; } }
"""


def html_report(report: Mapping[str, Any]) -> str:
    """The whole page, from the content of report.json; everything in it that is text is escaped."""
    method, decoder = report["method"], report["decoder_parameters"]
    title = f"{_text(method['name'])}: {1 - decoder['after'] / decoder['before']:.1%} of the decoder parameters removed"
    least = report["shape"] | report["narrowest"]
    ranges = {group: f"{kept:,}" if kept == least[group] else f"{least[group]:,} to {kept:,}" for group, kept in report["shape"].items()}
    facts = [", ".join(f"{_text(group)} {kept}" for group, kept in ranges.items())]
    facts += [f"{_text(name)} {_text(value)}" for name, value in method.items() if name != "name"]
    versions = {"rayprune": report["rayprune_version"]} | report["environment"]
    memory = [(name, f"{peak / 2**30:,.2f}") for name, peak in report["peak_memory_bytes"].items()]
    body = [
        f"<header><h1>{title}</h1><p>Kept in every layer: {' · '.join(facts)}</p></header>{_figures(report)}",
        f"<h2>Output error per layer</h2>{_errors(report['layers'])}",
        f"<h2>Time per stage</h2>{_stages(report['seconds'])}",
        f"<h2>Peak memory</h2>{_table('Peak memory', 'names', ['Process', 'GiB private'], memory)}",
        f"<h2>Layers</h2>{_layers(report['layers'])}",
        f"<h2>Environment</h2>{_table('Environment', 'names text', ['Name', 'Version'], versions.items())}",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n' + "\n".join(body) + "\n</main></body></html>\n"


def _text(value: object) -> str:
    return escape(str(value))


def _figures(report: Mapping[str, Any]) -> str:
    """What it cost, in figures, and the protocol behind the perplexities."""
    figures = [_figure("Parameters", report["parameters"], COUNTS), _figure("Decoder parameters", report["decoder_parameters"], COUNTS)]
    figures.append(_figure("Bytes on disk", report["bytes_on_disk"], BYTES))
    note = "Perplexity was not measured."
    if report["perplexity"]:
        figures.append(_figure("Perplexity", report["perplexity"], ()))
        used = report["evaluation"]
        counts = f"{used['windows']:,} windows · {used['scored_tokens']:,} scored tokens"
        note = f"Perplexity: text {used['path']} · window {used['window']:,} · stride {used['stride']:,} · {counts}"
    warnings = "".join(f"<p><strong>Warning:</strong> {_text(warning)}</p>" for warning in report["warnings"])
    return f"<dl>{''.join(figures)}</dl><p>{_text(note)}</p>{warnings}"


def _figure(name: str, values: Mapping[str, float], units: Sequence[tuple[float, str]]) -> str:
    """One figure before and after, in the unit that fits the first; without units, as it is."""
    before, after = values["before"], values["after"]
    size, unit = next((unit for unit in units if before >= unit[0]), units[-1] if units else (1.0, ""))
    large, origin = (f"{value / size:,.{2 if units else 3}f}{unit}" for value in (after, before))
    exact = f'<dd class="exact">{before:,} → {after:,}</dd>' if units else ""
    return f'<div><dt>{name}</dt><dd class="large">{large}</dd><dd>from {origin}</dd><dd>ratio {after / before:.4f}</dd>{exact}</div>'


def _errors(layers: Sequence[Mapping[str, Any]]) -> str:
    """One panel per pruned group, all to the same scale."""
    groups = list(dict.fromkeys(name for layer in layers for name in layer["groups"]))
    if not groups:
        return "<p>Nothing was pruned.</p>"
    ticks = _ticks(max(info[key] for layer in layers for info in layer["groups"].values() for key in SERIES.values()) or 1.0, 5)
    note = "|pruned − original| / |original| of a group's output, on the training shards (which the correction fits) and the held-out ones."
    return f"<p>{note}</p>" + "".join(_panel(number, name, layers, ticks) for number, name in enumerate(groups))


def _panel(number: int, group: str, layers: Sequence[Mapping[str, Any]], ticks: Sequence[float]) -> str:
    """Both errors of one group over the layers; a layer where it was not pruned leaves a gap."""
    step = (WIDTH - LEFT - RIGHT) / len(layers)
    xs = [LEFT + step * (index + 0.5) for index in range(len(layers))]
    parts = [_label(0, 15, "name panel", group), _frame([layer["layer"] for layer in layers], xs, ticks)]
    for series, key in SERIES.items():
        infos = [layer["groups"].get(group) for layer in layers]
        places = [(x, _y(info[key], ticks)) if info else None for x, info in zip(xs, infos, strict=True)]
        parts.append(f'<path class="{series}" d="{_line(places)}"/>')
        hints = [f"layer {layer['layer']}, {series}: {info[key]:.4f}" if info else "" for layer, info in zip(layers, infos, strict=True)]
        parts += [_point(place, series, min(3.0, step * 0.3), hint) for place, hint in zip(places, hints, strict=True) if place]
    description = "Training: dashed line, open circles. Held-out: solid line, filled circles. The table of layers has the values."
    return _svg(f"error-{number}", f"{group}: relative output error per layer", description, HEIGHT, parts)


def _line(places: Sequence[tuple[float, float] | None]) -> str:
    """The path through the points, broken at gaps."""
    pairs = zip([None, *places], places, strict=False)
    return "".join(f"{'L' if last else 'M'}{place[0]:.1f} {place[1]:.1f}" for last, place in pairs if place)


def _point(place: tuple[float, float], series: str, radius: float, hint: str) -> str:
    return f'<circle class="{series}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="{radius:.1f}"><title>{_text(hint)}</title></circle>'


def _y(value: float, ticks: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - value / ticks[-1] * (HEIGHT - TOP - BOTTOM)


def _ticks(largest: float, most: int) -> list[float]:
    """From zero to at least `largest` in steps of 1, 2 or 5 times a power of ten."""
    scale = 10.0 ** floor(log10(largest / most))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale * most >= largest * (1 - 1e-9))
    return [step * number for number in range(ceil(largest / step - 1e-9) + 1)]


def _frame(layers: Sequence[int], xs: Sequence[float], ticks: Sequence[float]) -> str:
    """What is around the lines: legend, horizontal rules with their errors, layer numbers."""
    every = max(1, round(_ticks(len(layers), 20)[1]))
    lines = [_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", "layer")]
    lines += [_label(x, HEIGHT - BOTTOM + 18, "middle", layer) for x, layer in list(zip(xs, layers, strict=True))[::every]]
    for x, series in zip((WIDTH - 240, WIDTH - 120), SERIES, strict=True):
        lines += [f'<path class="{series}" d="M{x} 11H{x + 36}"/>', _point((x + 18, 11), series, 3, series), _label(x + 44, 15, "", series)]
    for tick in ticks:
        lines.append(f'<path class="grid" d="M{LEFT} {_y(tick, ticks):.1f}H{WIDTH - RIGHT}"/>')
        lines.append(_label(LEFT - 8, _y(tick, ticks) + 4, "end", f"{tick:.4g}"))
    return "".join(lines)


def _label(x: float, y: float, style: str, content: object) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{_text(content)}</text>'


def _svg(name: str, title: str, description: str, height: float, parts: Iterable[str]) -> str:
    labels = f'<title id="{name}-title">{_text(title)}</title><desc id="{name}-desc">{_text(description)}</desc>'
    attributes = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc" viewBox="0 0 {WIDTH} {height}"'
    return f"<figure><svg {attributes}>{labels}{''.join(parts)}</svg></figure>"


def _stages(seconds: Mapping[str, float]) -> str:
    """A bar per stage, and the total in words."""
    stages = {name: value for name, value in seconds.items() if name != "total"}
    total, room = sum(stages.values()), WIDTH - BAR_LEFT - BAR_RIGHT
    bars = []
    for y, (name, value) in enumerate(stages.items()):
        width = max(1.0, room * value / (max(stages.values()) or 1.0))
        bars.append(_label(0, y * BAR_STEP + 20, "name", name))
        bars.append(f'<rect class="bar" x="{BAR_LEFT}" y="{y * BAR_STEP + 6}" width="{width:.1f}" height="19"/>')
        bars.append(_label(BAR_LEFT + width + 8, y * BAR_STEP + 20, "", f"{value:,.1f} s · {value / (total or 1.0):.1%}"))
    description = ", ".join(f"{name} {value:,.1f} seconds" for name, value in seconds.items())
    return f"<p>{total:,.1f} s in all</p>" + _svg("stages", "Seconds per stage", description, len(stages) * BAR_STEP + 6, bars)


def _table(label: str, style: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    cells = (f'<th scope="row">{_text(name)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in rest) for name, *rest in rows)
    body = "</tr><tr>".join(cells)
    return f'<table class="{style}" aria-label="{label}"><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>'


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """A row per layer and pruned group; a layer that was left as it is has one row."""
    rows: list[Sequence[object]] = []
    for layer in layers:
        for group, info in layer["groups"].items():
            errors = (f"{info[key]:.4f}" for key in SERIES.values())
            rows.append((layer["layer"], group, f"{info['kept']:,} / {info['of']:,}", f"{info['damping']:g}", *errors))
        rows += [] if layer["groups"] else [(layer["layer"], "not pruned", *[""] * 4)]
    return _table("Layers", "wide", ["Layer", "Group", "Kept / of", "Damping", "Training error", "Held-out error"], rows)
