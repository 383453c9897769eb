"""A report as one static HTML page."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rayprune.orchestrator.reporting.charts import (
    HEIGHT,
    WIDTH,
    bars,
    curve,
    frame,
    height,
    label,
    line,
    places,
    point,
    svg,
    ticks,
)
from rayprune.orchestrator.reporting.page import page
from rayprune.orchestrator.reporting.report import (
    Change,
    GroupReport,
    LayerReport,
    Report,
    Training,
    closeness_lines,
    own_text_lines,
    step_table,
)
from rayprune.orchestrator.reporting.tables import html_table, text, titled

SERIES: dict[str, Callable[[GroupReport], float]] = {
    "training": lambda group: group.training_error,
    "held-out": lambda group: group.held_out_error,
}
COUNTS = ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1.0, ""))
BYTES = ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))


def html_report(report: Report) -> str:
    """The whole page; everything in it that is text is escaped."""
    method = report.method
    title = (
        f"{text(report.dense.name) + ', ' if report.dense else ''}{text(method['name'])}:"
        f" {1 - report.decoder_parameters.ratio:.1%} of the decoder parameters removed"
    )
    facts = [", ".join(f"{text(titled(group))} {kept}" for group, kept in report.kept.items())]
    facts += [
        f"{text(name)} {text(value)}"
        for name, value in method.items()
        if name != "name" and not isinstance(value, Mapping)
    ]
    versions = {"rayprune": report.rayprune_version} | report.environment
    memory = [(name, f"{peak / 2**30:,.2f}") for name, peak in report.peak_memory_bytes.items()]
    body = [
        (
            f"<header><h1>{title}</h1><p>Kept in every layer:"
            f" {' · '.join(facts)}</p>{_when(report)}</header>{_figures(report)}"
        ),
        *([f"<h2>Steps</h2>{_steps(report)}"] if report.steps else []),
        f"<h2>Output error per layer</h2>{_errors(report.layers)}",
        *([f"<h2>Training</h2>{_trainings(report.training)}"] if report.training else []),
        f"<h2>Time per stage</h2>{_stages(report.seconds)}",
        "<h2>Peak memory</h2>",
        html_table("Peak memory", "names", ["Process", "GiB private"], memory),
        f"<h2>Layers</h2>{_layers(report.layers)}",
        *([f"<h2>Experts</h2>{_experts(report.layers)}"] if _have_experts(report) else []),
        "<h2>Environment</h2>",
        html_table("Environment", "names text", ["Name", "Version"], versions.items()),
    ]
    return page(title, body)


def _when(report: Report) -> str:
    if report.finished is None:
        return ""
    time = datetime.fromisoformat(report.finished)
    return f'<p><time datetime="{text(report.finished)}">{time:%-d %B %Y, %H:%M} UTC</time></p>'


def _figures(report: Report) -> str:
    """What it cost, in figures, and the protocol behind the perplexities."""
    figures = [
        _figure("Parameters", report.parameters, COUNTS),
        _figure("Decoder parameters", report.decoder_parameters, COUNTS),
    ]
    figures.append(_figure("Bytes on disk", report.bytes_on_disk, BYTES))
    note = "Perplexity was not measured."
    if report.masked_lm_loss:
        figures.append(_figure("Loss of masked tokens, nats", report.masked_lm_loss, ()))
    if report.embeddings and report.evaluation:
        alike = Change[float](before=1.0, after=report.embeddings.cosine)
        figures.append(_figure("Embeddings, cosine with the dense model's", alike, ()))
        note = (
            f"Embeddings: text {report.evaluation.path} · {report.evaluation.windows:,} windows of"
            f" {report.evaluation.window:,} tokens · least cosine"
            f" {report.embeddings.least_cosine:.4f}"
        )
    if report.perplexity and report.evaluation:
        figures.append(_figure("Perplexity", report.perplexity, ()))
        if recovered := report.perplexity.recovered:
            figures.append(
                _figure(
                    "Perplexity, recovered",
                    report.perplexity.model_copy(update={"after": recovered}),
                    (),
                )
            )
        used = report.evaluation
        counts = f"{used.windows:,} windows · {used.scored_tokens:,} scored tokens"
        note = (
            f"Perplexity: text {used.path} · window {used.window:,} · stride"
            f" {used.stride:,} · {counts}"
        )
    notes = "".join(
        f"<p>{text(line)}.</p>"
        for line in (note.rstrip("."), *closeness_lines(report), *own_text_lines(report))
    )
    warnings = "".join(
        f"<p><strong>Warning:</strong> {text(warning)}</p>" for warning in report.warnings
    )
    return f"<dl>{''.join(figures)}</dl>{notes}{warnings}"


def _figure(name: str, values: Change[Any], units: Sequence[tuple[float, str]]) -> str:
    """One figure before and after, in the unit that fits the first; without units, as it is."""
    before, after = values.before, values.after
    size, unit = next(
        (unit for unit in units if before >= unit[0]), units[-1] if units else (1.0, "")
    )
    large, origin = (f"{value / size:,.{2 if units else 3}f}{unit}" for value in (after, before))
    exact = f'<dd class="exact">{before:,} → {after:,}</dd>' if units else ""
    return (
        f'<div><dt>{name}</dt><dd class="large">{large}</dd><dd>from {origin}</dd><dd>ratio'
        f" {values.ratio:.4f}</dd>{exact}</div>"
    )


def _errors(layers: Sequence[LayerReport]) -> str:
    """One panel per pruned group, all to the same scale."""
    groups = list(dict.fromkeys(name for layer in layers for name in layer.together))
    if not groups:
        return "<p>Nothing was pruned.</p>"
    marks = ticks(
        0,
        max(
            error(info)
            for layer in layers
            for info in layer.together.values()
            for error in SERIES.values()
        ),
        5,
    )
    note = (
        "|pruned − original| / |original| of a group's output, on the training shards (which the"
        " correction fits) and the held-out ones."
    )
    return f"<p>{note}</p>" + "".join(
        _panel(number, name, layers, marks) for number, name in enumerate(groups)
    )


def _panel(number: int, group: str, layers: Sequence[LayerReport], marks: Sequence[float]) -> str:
    """Both errors of one group over the layers; a layer where it was not pruned leaves a gap."""
    xs = places(len(layers))
    parts = [
        label(0, 15, "name panel", titled(group)),
        frame([layer.layer for layer in layers], "layer", marks),
    ]
    for x, series in zip((WIDTH - 240, WIDTH - 120), SERIES, strict=True):
        parts += [
            f'<path class="{series}" d="M{x} 11H{x + 36}"/>',
            point((x + 18, 11), series, 3, series),
            label(x + 44, 15, "", series),
        ]
    for series, error in SERIES.items():
        infos = [layer.together.get(group) for layer in layers]
        points = [
            (x, height(error(info), marks)) if info else None
            for x, info in zip(xs, infos, strict=True)
        ]
        parts.append(f'<path class="{series}" d="{line(points)}"/>')
        hints = [
            f"layer {layer.layer}, {series}: {error(info):.4f}" if info else ""
            for layer, info in zip(layers, infos, strict=True)
        ]
        radius = min(3.0, WIDTH / len(layers) * 0.3)
        parts += [
            point(place, series, radius, hint)
            for place, hint in zip(points, hints, strict=True)
            if place
        ]
    description = (
        "Training: dashed line, open circles. Held-out: solid line, filled circles. The table of"
        " layers has the values."
    )
    return svg(
        f"error-{number}", f"{group}: relative output error per layer", description, HEIGHT, parts
    )


def _steps(report: Report) -> str:
    """A row per pass."""
    note = (
        "Perplexity, divergence (nats per token) and agreement are to the original, on windows of"
        " the calibration text that nothing was decided by."
    )
    table = step_table(report)
    return f"<p>{note}</p>" + html_table(table.title, "wide", table.columns, table.rows)


def _trainings(trainings: Mapping[str, Training]) -> str:
    """What every training minimised, and its gradient's norm, step by step."""
    parts = []
    for task, training in trainings.items():
        parts.append(f"<p>{text(task)}: {training.tokens_per_second:,.0f} tokens per second</p>")
        for name, values in training.curves.items():
            parts.append(
                curve(
                    f"{task}-{name}",
                    f"{task}: {name.replace('_', ' ')}",
                    values,
                    "step",
                    training.steps,
                )
            )
    return "".join(parts)


def _stages(seconds: Mapping[str, float]) -> str:
    """A bar per stage, and the total in words."""
    stages = {name: value for name, value in seconds.items() if name != "total"}
    total = sum(stages.values())
    hints = {
        name: f"{value:,.1f} s · {value / (total or 1.0):.1%}" for name, value in stages.items()
    }
    return f"<p>{total:,.1f} s in all</p>" + bars("stages", "Seconds per stage", stages, hints)


def _layers(layers: Sequence[LayerReport]) -> str:
    """A row per layer and pruned group; a layer that was left as it is has one row."""
    rows: list[Sequence[object]] = []
    for layer in layers:
        for group, info in layer.together.items():
            errors = (f"{error(info):.4f}" for error in SERIES.values())
            rows.append(
                (
                    layer.layer,
                    titled(group),
                    f"{info.kept:,} / {info.of:,}",
                    f"{info.damping:g}",
                    *errors,
                )
            )
        rows += [] if layer.groups else [(layer.layer, "not pruned", *[""] * 4)]
    return html_table(
        "Layers",
        "wide",
        ["Layer", "Group", "Kept / of", "Damping", "Training error", "Held-out error"],
        rows,
    )


def _have_experts(report: Report) -> bool:
    return any(layer.tokens_by_expert for layer in report.layers)


def _experts(layers: Sequence[LayerReport]) -> str:
    """A row for every layer with experts: the tokens that were routed to each, of those that are
    gone in brackets.
    """
    rows = []
    for layer in layers:
        if tokens := layer.tokens_by_expert:
            units = next((g.units for g in layer.groups.values() if g.units is not None), None)
            stay = set(tokens if units is None else units)
            each = ", ".join(f"{n:,}" if e in stay else f"({n:,})" for e, n in tokens.items())
            rows.append((layer.layer, f"{len(stay)} / {len(tokens)}", min(tokens.values()), each))
    columns = ["Layer", "Kept / of", "Fewest tokens", "Tokens by expert"]
    return html_table("Experts", "wide", columns, rows)
