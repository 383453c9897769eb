"""A report as one static HTML page, in the order in which a reader asks: what came of it, what is
doubtful, how large and how good the model is, what went, how it was made, and how to use it.

A section is a function from the report to its part of the page, empty where there is nothing to
tell.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime

from rayprune.orchestrator.reporting.charts import curve, layers_drawing, timeline_drawing
from rayprune.orchestrator.reporting.facts import Change, GroupReport, LayerReport
from rayprune.orchestrator.reporting.html_quality import quality, samples
from rayprune.orchestrator.reporting.page import (
    code,
    drawings,
    folded,
    note,
    page,
    section,
    wide_table,
)
from rayprune.orchestrator.reporting.report import (
    Report,
    dropped_words,
    layer_table,
    layers_gone,
    own_text_lines,
    site_table,
    step_table,
)
from rayprune.orchestrator.reporting.speeds import protocol, speed_table
from rayprune.orchestrator.reporting.tables import html_table, text, titled
from rayprune.orchestrator.reporting.verdict import verdict
from rayprune.specs.methods import METHODS

SERIES: dict[str, Callable[[GroupReport], float]] = {
    "training": lambda group: group.training_error,
    "held-out": lambda group: group.held_out_error,
}
COUNTS = ((1e9, " B"), (1e6, " M"), (1e3, " k"), (1.0, ""))
BYTES = ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))
MOST_ROWS = 24
"""Workers that the time line shows."""
LOADING = """from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{folder}"{code})
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""


def html_report(report: Report, job: str) -> str:
    """The whole page; `job` is the job's file. Everything in it that is text is escaped."""
    name = report.dense.name if report.dense else report.method["name"]
    title = f"{text(name)}, {report.done}"
    sections = (section_of(report) for section_of in SECTIONS)
    return page(title, [_head(report, title), *filter(None, sections), _reproduce(report, job)])


def _is_usual(report: Report, option: str) -> bool:
    """Whether an option of the method is as it is by default."""
    field = (
        METHODS[name].model_fields.get(option)
        if (name := report.method["name"]) in METHODS
        else None
    )
    return field is not None and report.method[option] == field.default


def _head(report: Report, title: str) -> str:
    options = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in report.method.items()
        if name != "name" and not isinstance(value, Mapping) and not _is_usual(report, name)
    ]
    facts = [f"{titled(group)} {kept}" for group, kept in report.kept.items()]
    lines = [
        f"Kept in every layer: {', '.join(facts)}.",
        f"Method {report.method['name']}{': ' if options else ''}{' · '.join(options)}.",
        *(f"{line}.".capitalize() for line in own_text_lines(report)),
    ]
    when = ""
    if report.finished is not None:
        time = datetime.fromisoformat(report.finished)
        when = f'<time datetime="{text(report.finished)}">{time:%-d %B %Y, %H:%M} UTC</time>, '
    made = f'<p class="note">{when}rayprune {text(report.rayprune_version)}</p>'
    return (
        f'<header><h1>{title}</h1><p class="verdict">{text(verdict(report))}</p>'
        f"{''.join(map(note, lines))}{made}</header>"
    )


def _warnings(report: Report) -> str:
    return "".join(
        f'<p class="warning"><strong>Warning:</strong> {text(warning)}</p>'
        for warning in report.warnings
    )


def _figures(report: Report) -> str:
    """Size and quality in figures, before and after."""
    figures = [
        _figure("Parameters", report.parameters, COUNTS),
        _figure("Decoder parameters", report.decoder_parameters, COUNTS),
        _figure("Bytes on disk", report.bytes_on_disk, BYTES),
    ]
    if found := report.perplexity:
        figures.append(_figure("Perplexity", found, ()))
        if found.recovered:
            recovered = Change[float](before=found.before, after=found.recovered)
            figures.append(_figure("Perplexity, recovered", recovered, ()))
    if report.masked_lm_loss:
        figures.append(_figure("Loss of masked tokens, nats", report.masked_lm_loss, ()))
    if close := report.closeness.get(report.taken):
        figures.append(_plain("KL divergence", f"{close.divergence:.4f}", "nats for a token"))
        figures.append(_plain("Same likeliest token", f"{close.agreement:.1%}", "of tokens"))
    if alike := report.embeddings:
        least = f"at least {alike.least_cosine:.4f}"
        figures.append(_plain("Cosine of embeddings", f"{alike.cosine:.4f}", least))
    if workers := [v for name, v in report.peak_memory_bytes.items() if name != "driver"]:
        figures.append(_plain("Memory of a worker", f"{max(workers) / 2**30:.2f} GiB", "at most"))
    figures.append(_plain("Whole run", _duration(report.seconds.get("total", 0.0)), ""))
    return f"<section><dl>{''.join(figures)}</dl></section>"


def _figure(
    name: str, values: Change[int] | Change[float], units: Sequence[tuple[float, str]]
) -> str:
    """One figure before and after, in the unit that fits the first; without units, as it is."""
    before, after = values.before, values.after
    size, unit = next(
        (unit for unit in units if before >= unit[0]), units[-1] if units else (1.0, "")
    )
    large, origin = (f"{value / size:,.{2 if units else 3}f}{unit}" for value in (after, before))
    exact = f"{before:,} → {after:,}" if units else ""
    return _plain(name, large, f"from {origin}", f"ratio {values.ratio:.4f}", exact)


def _plain(name: str, large: str, *lines: str) -> str:
    kinds = ["", "", ' class="exact"']
    below = "".join(
        f"<dd{kind}>{line}</dd>" for kind, line in zip(kinds, lines, strict=False) if line
    )
    return f'<div><dt>{name}</dt><dd class="large">{large}</dd>{below}</div>'


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{seconds:.1f} s"


def _speed(report: Report) -> str:
    """What `rayprune bench` has measured, if it has."""
    if report.speeds is None:
        return ""
    table = speed_table(report.speeds)
    told = wide_table(table.title, table.columns, table.rows)
    return section("Speed", note(text(protocol(report.speeds))), told)


def _layers(report: Report) -> str:
    """What went of every layer, and how well the correction makes up for it."""
    groups = list(dict.fromkeys(name for layer in report.layers for name in layer.together))
    dropped = note(text(dropped_words(report.dropped))) if report.dropped else ""
    if not groups:
        return section("What was removed", dropped or note("Nothing was pruned."))
    told = (
        "Kept: what is filled, of all units in a layer. Output error: |pruned − original| /"
        " |original| of a group's output, on the training shards (which the correction fits) and"
        " the held-out ones."
    )
    gone = layers_gone(report)
    drawn = (_group(number, name, report.layers, gone) for number, name in enumerate(groups))
    table = layer_table(report)
    rows = wide_table("Layers", table.columns, table.rows)
    zeros = site_table(report)
    sites = wide_table("Zeros", zeros.columns, zeros.rows) if report.zeros else ""
    return section(
        "What was removed", dropped, note(told), sites, drawings(drawn), folded("Every layer", rows)
    )


def _group(number: int, group: str, layers: Sequence[LayerReport], gone: Set[int]) -> str:
    found = {
        at: layer.together[group] for at, layer in enumerate(layers) if group in layer.together
    }
    errors = {
        series: {at: error(info) for at, info in found.items()} for series, error in SERIES.items()
    }
    kept = {at: (info.kept, info.of) for at, info in found.items()}
    most = max(of for _, of in kept.values())
    kept |= {at: (0, most) for at, layer in enumerate(layers) if layer.layer in gone}
    return layers_drawing(f"group-{number}", titled(group), kept, errors, len(layers))


def _steps(report: Report) -> str:
    """A row per pass."""
    if not report.steps:
        return ""
    told = (
        "Perplexity, divergence (nats per token) and agreement are to the original, on windows of"
        " the calibration text that nothing was decided by."
    )
    table = step_table(report)
    return section("Steps", note(told), wide_table(table.title, table.columns, table.rows))


def _experts(report: Report) -> str:
    """A row for every layer with experts: the tokens that were routed to each, of those that are
    gone in brackets.
    """
    rows = []
    for layer in report.layers:
        if tokens := layer.tokens_by_expert:
            units = next((g.units for g in layer.groups.values() if g.units is not None), None)
            stay = set(tokens if units is None else units)
            each = ", ".join(f"{n:,}" if e in stay else f"({n:,})" for e, n in tokens.items())
            rows.append((layer.layer, f"{len(stay)} / {len(tokens)}", min(tokens.values()), each))
    if not rows:
        return ""
    columns = ["Layer", "Kept / of", "Fewest tokens", "Tokens by expert"]
    return section("Experts", wide_table("Experts", columns, rows))


def _trainings(report: Report) -> str:
    """What every training minimised, and its gradient's norm, step by step."""
    parts = []
    for number, (task, training) in enumerate(report.training.items()):
        parts.append(note(f"{task}: {training.tokens_per_second:,.0f} tokens per second"))
        parts.append(
            drawings(
                curve(
                    f"training-{number}-{place}",
                    f"{task}: {name.replace('_', ' ')}",
                    "step",
                    training.steps,
                    values,
                )
                for place, (name, values) in enumerate(training.curves.items())
            )
        )
    return section("Training", *parts)


def _course(report: Report) -> str:
    """When what was done, by whom, and what it took."""
    stages = {name: value for name, value in report.seconds.items() if name != "total"}
    total = sum(stages.values())
    rows = [
        (name, f"{value:,.1f}", f"{value / (total or 1.0):.1%}") for name, value in stages.items()
    ]
    times = html_table("Time per stage", "names", ["Stage", "Seconds", "Part"], rows)
    peaks = [(name, f"{peak / 2**30:,.2f}") for name, peak in report.peak_memory_bytes.items()]
    memory = html_table("Peak memory", "names", ["Process", "GiB private"], peaks)
    tables = f'<div class="drawings"><div>{times}</div><div>{memory}</div></div>'
    return section("Time and memory", note(f"{total:,.1f} s in all."), _timeline(report), tables)


def _timeline(report: Report) -> str:
    if not report.timeline:
        return ""
    workers = list(dict.fromkeys(worker for span in report.timeline for worker in span.busy))
    rows = {
        stage: [(s.start, s.seconds, 1.0) for s in report.timeline if s.stage == stage]
        for stage in dict.fromkeys(span.stage for span in report.timeline)
    }
    for worker in workers[:MOST_ROWS]:
        rows[worker] = [
            (s.start, s.seconds, min(1.0, s.busy.get(worker, 0.0) / (s.seconds or 1.0)))
            for s in report.timeline
        ]
    told = "A worker's bar is filled for the part of the stage in which it computed."
    if (left := len(workers) - MOST_ROWS) > 0:
        told += f" {left} further workers are not drawn."
    return timeline_drawing("timeline", "Time line", rows) + note(told)


def _loading(report: Report) -> str:
    models = report.models
    trusted = ", trust_remote_code=True" if models.own_class else ""
    lines = LOADING.format(auto_class=models.auto_class, folder=report.model, code=trusted)
    others = [f"{target}: {report.run / folder}" for target, folder in models.exports.items()]
    return section("How to load it", code("\n".join([lines, *(f"# {line}" for line in others)])))


def _reproduce(report: Report, job: str) -> str:
    """The job, the command, and what else decides about the bits."""
    versions = {"rayprune": report.rayprune_version} | report.environment
    table = html_table("Environment", "names text", ["Name", "Version"], versions.items())
    return section(
        "How to make it again",
        code("rayprune run job.yaml --out RUN"),
        folded("job.yaml, with all defaults", code(job)),
        folded("Versions", table),
    )


SECTIONS: Sequence[Callable[[Report], str]] = (
    _warnings,
    _figures,
    quality,
    _speed,
    samples,
    _layers,
    _steps,
    _experts,
    _trainings,
    _course,
    _loading,
)
"""In the order of the page."""
