"""What a run has achieved and cost. report.json, the page, the terminal and a notebook are all made
from what is here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from rayprune.orchestrator.execution.run_folder import PAGE_FILE, REPORT_FILE
from rayprune.orchestrator.reporting.facts import (
    Change,
    Closeness,
    Dense,
    Embeddings,
    Evaluation,
    Facts,
    GroupReport,
    LayerReport,
    Models,
    OnText,
    OwnText,
    Perplexity,
    Records,
    Sample,
    Score,
    Span,
    StepReport,
    Training,
)
from rayprune.orchestrator.reporting.speeds import Speeds, speed_parts
from rayprune.orchestrator.reporting.tables import Part, Table, html_parts, titled
from rayprune.specs.errors import SpecError
from rayprune.workers.store.layout import EVENTS_FILE

MODELS = {"before": "dense", "after": "pruned", "recovered": "recovered"}
"""What people call the models."""


class Report(Facts):
    """The report of a finished run."""

    run: Path = Field(exclude=True)
    """The run folder; it is not part of report.json, so that a run can be moved."""
    schema_version: int
    rayprune_version: str
    environment: dict[str, str]
    """Versions of the packages that decide about the result's bits."""
    models: Models = Models()
    dense: Dense | None = None
    """Null in reports of the first versions."""
    finished: str | None = None
    """When the last attempt ended, in UTC, ISO 8601."""
    method: dict[str, Any]
    """The job's section `method`, defaults included."""
    shape: dict[str, int]
    """Units that stay of every group; the most, where layers differ."""
    narrowest: dict[str, int]
    """The least that stay in a layer, of groups where layers differ."""
    allocation: dict[str, Any] | None = None
    """How layers that differ got their sizes."""
    dropped: dict[str, Any] | None = None
    """Whole layers that have gone before anything else: their numbers, and what was measured to
    choose them; no such key where none has.
    """
    parameters: Change[int]
    decoder_parameters: Change[int]
    bytes_on_disk: Change[int]
    served_bytes: Change[int] | None = None
    """Of the weights, where a GPU holds 2:4 matrices without their zeros; no such key where the
    model has none.
    """
    perplexity: Perplexity | None
    """Null without a section `evaluation`, and of an encoder."""
    closeness: dict[str, Closeness] = Field(default={})
    """By model, `after` and `recovered`, on the windows of the perplexity."""
    masked_lm_loss: Change[float] | None = None
    """Nats for a masked token, of an encoder that predicts them; else there is no such key."""
    embeddings: Embeddings | None = None
    """Of an encoder that was evaluated; else there is no such key."""
    texts: dict[str, dict[str, OnText]] = Field(default={})
    """What was measured on each text, by its name and the model's (`before`, `after`,
    `recovered`); the numbers above are of all texts together.
    """
    samples: tuple[Sample, ...] = ()
    """What the models write, by the likeliest token, where the job has prompts."""
    scores: tuple[Score, ...] = ()
    """What the models achieve in tasks of lm-eval, where the job has some."""
    evaluation: Evaluation | None
    speeds: Speeds | None = None
    """Where `rayprune bench --run` has measured them; else there is no such key."""
    calibration: dict[str, Any]
    """The job's section `calibration`, defaults included."""
    own_text: OwnText | None = None
    """Where the model has written some; else there is no such key."""
    recovery: dict[str, Any] | None = None
    """What was trained on after the cut, in the form of `calibration`; else there is no such
    key.
    """
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    """By stage, over all attempts, and `total`."""
    step_seconds: dict[str, float]
    """By step of the workers, all workers together, in the last attempt that did any."""
    timeline: tuple[Span, ...] = ()
    """The stages one after another, over all attempts; empty in reports of the first versions."""
    peak_memory_bytes: dict[str, int]
    """Private memory by process, over all attempts."""
    training: dict[str, Training]
    layers: tuple[LayerReport, ...]
    """Of the last step, where there are several: kept of what the one before has left."""
    steps: tuple[StepReport, ...] = ()
    """The passes, where they are several: those that the gate has let pass, and the one at which it
    closed.
    """
    records: Records | None = None
    """Null before the report is written, and in reports of the first versions."""

    @property
    def is_pruned(self) -> bool:
        """Whether anything was removed."""
        return self.decoder_parameters.after < self.decoder_parameters.before

    @property
    def kept(self) -> dict[str, str]:
        """Units that stay in a layer of every group; where layers differ, from the least to the
        most.
        """
        return {
            group: f"{most:,}"
            if most == (least := self.narrowest.get(group, most))
            else f"{least:,} to {most:,}"
            for group, most in self.shape.items()
        }

    @property
    def taken(self) -> str:
        """What the model to take is called where models are told apart."""
        return "recovered" if self.perplexity and self.perplexity.recovered else "after"

    def ratio(self, text: str) -> float | None:
        """Perplexity of the model to take on one of the texts, as a multiple of the dense one's;
        None: not measured.
        """
        dense, taken = (
            found.perplexity if (found := self.texts[text].get(name)) else None
            for name in ("before", self.taken)
        )
        return taken / dense if dense and taken else None

    @property
    def zeros(self) -> int:
        """Weights that have become zero in matrices that keep their size."""
        sparse = (g for layer in self.layers for g in layer.groups.values() if g.mask_error)
        return sum(group.of - group.kept for group in sparse)

    @property
    def done(self) -> str:
        """How much of the decoder is gone, in words."""
        removed = f"{1 - self.decoder_parameters.ratio:.1%} of the decoder parameters removed"
        if not self.zeros:
            return removed
        zero = f"{self.zeros / self.decoder_parameters.before:.1%} of the decoder parameters zero"
        return f"{removed}, {zero}" if self.is_pruned else zero

    @property
    def model(self) -> Path:
        """Folder of the model to take: the recovered one if there is one, else the pruned one."""
        return self.recovered_model or self.pruned_model

    @property
    def pruned_model(self) -> Path:
        """Folder of the pruned model, before any recovery."""
        return self.run / self.models.pruned

    @property
    def recovered_model(self) -> Path | None:
        """Folder of the recovered model, None without `recover`."""
        return self.run / self.models.recovered if self.models.recovered else None

    @property
    def model_folders(self) -> list[Path]:
        """Folders of all its models."""
        return [folder for folder in (self.pruned_model, self.recovered_model) if folder]

    @property
    def page(self) -> Path:
        """The report as an HTML page."""
        return self.run / PAGE_FILE

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What only some jobs have, or was not measured, is no key of other reports, rather than a
        null.
        """
        may_lack = {"masked_lm_loss", "embeddings", "own_text", "recovery", "speeds", "dropped"}
        may_lack |= {"served_bytes"}
        return {
            name: value
            for name, value in fields(self).items()
            if name not in may_lack or value is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return self.model_dump(mode="json")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_parts(summary(self))


def read_report(run: str | Path) -> Report:
    """The report of a finished run.

    Raises:
        SpecError: there is none, or it is damaged.
    """
    folder = Path(run).absolute()
    try:
        content = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        otherwise = (
            "the run has not ended: `rayprune run` with its job and this folder goes on"
            if (folder / EVENTS_FILE).exists()
            else "name the folder of a finished run"
        )
        raise SpecError(f"{run}: no {REPORT_FILE} here; {otherwise}") from None
    try:
        return Report.model_validate({**_mapping(content), "run": folder})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SpecError(
            f"{folder / REPORT_FILE}: is not a report: {place}: {first['msg']}; run the job again"
            " to write it anew"
        ) from None


def _mapping(content: object) -> Mapping[str, Any]:
    return content if isinstance(content, dict) else {}


def summary(report: Report) -> Iterator[Part]:
    """What a run has achieved and cost, and where its results are."""
    yield Table("result", ["", "before", "after", "after / before"], list(_changes(report)))
    yield from _measured(report)
    yield from own_text_lines(report)
    yield from speed_parts(report.speeds)
    if report.zeros:
        yield f"{report.zeros:,} weights are zero: {report.done}"
        yield site_table(report)
    if report.steps:
        yield step_table(report)
    if report.dropped:
        yield dropped_words(report.dropped)
    if report.allocation:
        shown = {
            key.replace("_", " "): value
            for key, value in report.allocation.items()
            if key not in ("name", "by_generation") and not isinstance(value, Mapping)
        }
        yield f"allocation: {report.allocation['name']}, " + ", ".join(
            f"{key} {value:.6g}" for key, value in shown.items()
        )
        for key, value in report.allocation.items():
            if isinstance(value, Mapping):
                each = (f"{text} {number:.6g}" for text, number in value.items())
                yield f"{key.replace('_', ' ')}: {', '.join(each)}"
    yield "seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in report.seconds.items())
    yield "peak memory: " + ", ".join(
        f"{name} {value / 2**30:.2f} GiB" for name, value in report.peak_memory_bytes.items()
    )
    yield from (f"warning: {warning}" for warning in report.warnings)
    other = f", not recovered: {report.pruned_model}" if report.recovered_model else ""
    yield f"model: {report.model}{other}, report: {report.page}"
    for target, folder in report.models.exports.items():
        yield f"{target}: {report.run / folder}"


def dropped_words(dropped: Mapping[str, Any]) -> str:
    """Which whole layers have gone, and by what they were chosen."""
    words = "layers left out: " + ", ".join(map(str, dropped["layers"]))
    if found := dropped.get("influence"):
        least = ", ".join(f"{found[layer]:.4f}" for layer in dropped["layers"])
        return f"{words}, by block influence ({least})"
    if found := dropped.get("divergence"):
        return f"{words}, by divergence ({found[-1]:.4f} without all of them)"
    return words


def _changes(report: Report) -> Iterator[list[str]]:
    for name in ("parameters", "decoder_parameters", "bytes_on_disk", "served_bytes"):
        if (size := getattr(report, name)) is not None:
            yield _change(name, size, "{:,.0f}")
    if report.perplexity:
        yield _change("perplexity", report.perplexity, "{:.3f}")
    if report.masked_lm_loss:
        yield _change("masked_lm_loss", report.masked_lm_loss, "{:.4f}")


def _change(name: str, values: Change[Any], form: str) -> list[str]:
    return [name, form.format(values.before), form.format(values.after), f"{values.ratio:.4f}"]


def _measured(report: Report) -> Iterator[Part]:
    """What else is to say of the evaluation."""
    if report.perplexity and (recovered := report.perplexity.recovered):
        yield (
            f"perplexity after recovery: {recovered:.3f}"
            f" ({recovered / report.perplexity.before:.4f} of before)"
        )
    yield from closeness_lines(report)
    if len(report.texts) > 1 or (report.evaluation and report.evaluation.texts):
        yield text_table(report)
    if report.scores:
        yield score_table(report)
    if alike := report.embeddings:
        yield (
            f"embeddings: cosine with the dense model's {alike.cosine:.4f} on average, at least"
            f" {alike.least_cosine:.4f}"
        )
    if used := report.evaluation:
        what = "perplexity" if report.perplexity else "evaluation"
        yield (
            f"{what} of {used.files}: window {used.window}{used.begun}, stride {used.stride},"
            f" {used.windows} windows, {used.scored_tokens} scored tokens"
        )


def own_text_lines(report: Report) -> Iterator[str]:
    """What the model has written itself to be calibrated on."""
    if own := report.own_text:
        words = {"chat": "chats", "none": "from nothing", "calibration": "behind its first text"}
        yield (
            f"own text: {own.tokens:,} tokens in {own.documents:,} documents"
            + (f" ({words[own.prompts]})" if own.prompts else "")
            + f", {own.dropped:,} more dropped as loops"
        )


def closeness_lines(report: Report) -> Iterator[str]:
    """How close the models are to the dense one."""
    for name, close in report.closeness.items():
        words = "pruned" if name == "after" else name
        yield (
            f"{words} model beside the dense one: KL divergence {close.divergence:.4f} nats for a"
            f" token, the same likeliest token for {close.agreement:.1%}"
        )


def text_table(report: Report) -> Table:
    """The model to take on each text, beside the dense one."""
    rows = []
    for name, models in report.texts.items():
        if found := models.get(report.taken):
            values = (
                (found.perplexity, "{:.3f}"),
                (report.ratio(name), "{:.4f}"),
                (found.divergence, "{:.4f}"),
                (found.agreement, "{:.1%}"),
                (found.cosine, "{:.4f}"),
            )
            cells = ["" if value is None else form.format(value) for value, form in values]
            rows.append([name, *cells])
    columns = ["text", "perplexity", "times dense", "KL", "agreement", "cosine"]
    filled = [place for place in range(6) if any(row[place] for row in rows)]
    shown = [[row[place] for place in filled] for row in rows]
    return Table("on each text", [columns[place] for place in filled], shown)


def score_table(report: Report) -> Table:
    """What the models achieve in tasks of lm-eval."""
    models = [name for name in MODELS if name in report.scores[0].values]
    rows = [
        [
            score.name,
            *map(score.words, models),
            "" if score.documents is None else f"{score.documents:,}",
            "" if score.few_shot is None else str(score.few_shot),
            score.version,
        ]
        for score in report.scores
    ]
    names = (MODELS[name] for name in models)
    return Table("tasks of lm-eval", ["task", *names, "documents", "shots", "version"], rows)


STEP_COLUMNS = (
    "step",
    "removed",
    "decoder",
    "perplexity",
    "divergence",
    "agreement",
    "gate",
    "seconds",
)


def step_table(report: Report) -> Table:
    """What every pass has left, and how close it is to the original."""
    return Table("steps", STEP_COLUMNS, [_step_row(step) for step in report.steps])


def _step_row(step: StepReport) -> list[str]:
    return [
        str(step.number),
        f"{step.removed:.2%}",
        _millions(step.decoder_parameters),
        f"{step.perplexity:.4f}",
        f"{step.divergence:.4f}",
        f"{step.agreement:.4f}",
        "closed" if step.exceeded else "passed",
        f"{step.seconds:.1f}",
    ]


def site_table(report: Report) -> Table:
    """What the zeros of every site cost, the mean over the layers."""
    by_site: dict[str, list[GroupReport]] = {}
    for layer in report.layers:
        for name, group in layer.groups.items():
            if group.mask_error is not None:
                by_site.setdefault(name, []).append(group)
    rows = [
        [
            name,
            f"{fmean(group.mask_error or 0.0 for group in groups):.4f}",
            f"{fmean(group.held_out_error for group in groups):.4f}",
        ]
        for name, groups in by_site.items()
    ]
    return Table("zeros", ["site", "held-out error, mask alone", "corrected"], rows)


def _millions(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def layer_table(report: Report) -> Table:
    """What was kept in every layer, and how well the correction reproduces what was cut; a layer
    that was left as it is has one row.
    """
    columns = ["layer", "group", "kept", "damping", "training error", "held-out error"]
    gone = layers_gone(report)
    rows = [row for layer in report.layers for row in _layer_rows(layer, layer.layer in gone)]
    return Table("layers", columns, rows)


def layers_gone(report: Report) -> frozenset[int]:
    """Numbers of the layers that were left out as a whole."""
    return frozenset(report.dropped["layers"] if report.dropped else ())


def _layer_rows(layer: LayerReport, gone: bool) -> list[list[str]]:
    return [
        [
            str(layer.layer),
            titled(name),
            f"{group.kept:,} of {group.of:,}",
            f"{group.damping:g}",
            f"{group.training_error:.4f}",
            f"{group.held_out_error:.4f}",
        ]
        for name, group in layer.together.items()
    ] or [[str(layer.layer), "left out" if gone else "not pruned", "", "", "", ""]]
