"""What a run has achieved and cost. report.json, the page, the terminal and a notebook are all made
from what is here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from rayprune.orchestrator.execution.run_folder import PAGE_FILE, REPORT_FILE
from rayprune.orchestrator.reporting.tables import Part, Table, html_parts, titled
from rayprune.specs.errors import SpecError

N = TypeVar("N", int, float)


class _Facts(BaseModel):
    """Base of all parts: frozen; what a newer version has written besides is kept."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
        protected_namespaces=(),
    )


class Change(_Facts, Generic[N]):
    """A size of the dense and of the pruned model."""

    before: N
    after: N

    @property
    def ratio(self) -> float:
        """What is left, as a fraction."""
        return self.after / self.before


class Perplexity(Change[float]):
    """Perplexity of the dense, of the pruned and, if there is one, of the recovered model."""

    recovered: float | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A model that there is not has no key, rather than a null."""
        return {name: value for name, value in fields(self).items() if value is not None}


class Embeddings(_Facts):
    """How alike the pruned encoder's embeddings of the evaluation windows (the mean over their
    tokens) are to the dense one's.
    """

    cosine: float
    """Mean over the windows."""
    least_cosine: float
    """Of the window where they differ most."""


class Closeness(_Facts):
    """How close a model's next-token distributions are to the dense one's."""

    divergence: float
    """KL divergence from the dense model's, in nats for a token."""
    agreement: float
    """Fraction of the tokens for which both expect the same one most."""


class Models(_Facts):
    """Folders of models, relative to the run folder."""

    pruned: str = "model"
    recovered: str | None = None
    """Trained after the cut; null without `recover`."""
    own_class: bool = False
    """Whether the class that builds them travels with them: `trust_remote_code=True`."""
    auto_class: str = "AutoModelForCausalLM"
    """The class of transformers that loads them."""
    exports: dict[str, str] = {}
    """The model in the forms of other engines, by target."""


class Dense(_Facts):
    """The model that was pruned."""

    name: str
    """Its name on the Hub without the owner, or its folder's."""
    hub_id: str | None
    """OWNER/NAME, where its folder lies in the Hub's cache."""
    revision: str | None = None
    """The commit there."""
    licence: dict[str, str]
    """What its card says of it, by the Hub's keys."""
    units: dict[str, int]
    """Units of every group in a layer."""


class Evaluation(_Facts):
    """The protocol behind what was measured: numbers from different protocols cannot be compared.
    Other options of the job's section `evaluation` are here too.
    """

    path: str
    window: int
    """Tokens of a window."""
    stride: int
    """Tokens between the starts of two windows."""
    windows: int
    scored_tokens: int = 0
    """Tokens that were predicted."""


class GroupReport(_Facts):
    """What stayed of a coupled group in one layer; of experts that of each has an entry of its own,
    `neurons.3`.
    """

    kept: int
    of: int
    damping: float
    """Of the correction."""
    training_error: float
    """|pruned - original| / |original| of the group's output, on the shards that were fitted."""
    held_out_error: float
    """The same on the shards that were held out."""
    tokens: int | None = None
    """Of an expert: the calibration tokens that were routed to it."""
    units: tuple[int, ...] | None = None
    """Of whole experts: those that stay."""
    tokens_by_expert: tuple[int, ...] | None = None
    """Tokens that were routed to each before some went."""
    scores: tuple[float, ...] | None = None
    """What each was worth, by `budget.expert_score`."""

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What groups of other kinds have is left out, rather than null."""
        return {name: value for name, value in fields(self).items() if value is not None}


class LayerReport(_Facts):
    """One layer of the dense model."""

    layer: int
    """Counted from 0."""
    groups: dict[str, GroupReport]
    """The groups that lost units, or were corrected."""

    @property
    def together(self) -> dict[str, GroupReport]:
        """The groups, those of all experts as one: the largest damping, the mean of the errors, and
        all tokens.
        """
        by_name: dict[str, list[GroupReport]] = {}
        for name, group in self.groups.items():
            by_name.setdefault(name.partition(".")[0], []).append(group)
        return {name: _mean(found) for name, found in by_name.items()}

    @property
    def tokens_by_expert(self) -> dict[int, int]:
        """Calibration tokens that were routed to each expert, before some went; empty where no
        expert was looked at.
        """
        for group in self.groups.values():
            if group.tokens_by_expert is not None:
                return dict(enumerate(group.tokens_by_expert))
        return {
            int(name.partition(".")[2]): group.tokens
            for name, group in self.groups.items()
            if group.tokens is not None
        }


def _mean(groups: Sequence[GroupReport]) -> GroupReport:
    if len(groups) == 1:
        return groups[0]
    return GroupReport(
        kept=groups[0].kept,
        of=groups[0].of,
        damping=max(group.damping for group in groups),
        training_error=fmean(group.training_error for group in groups),
        held_out_error=fmean(group.held_out_error for group in groups),
        tokens=sum(group.tokens or 0 for group in groups),
    )


class Training(_Facts):
    """The course of a training."""

    steps: tuple[int, ...]
    """Numbers of the steps that are shown: all, or some where they are many."""
    curves: dict[str, tuple[float, ...]]
    """Terms of the loss and the gradient's norm, a value for each of these steps."""
    tokens_per_second: float


class StepReport(_Facts):
    """One of several passes."""

    number: int
    """Counted from 1."""
    sparsity: float
    """What was to go, of the original's decoder parameters."""
    removed: float
    """What is gone of them."""
    decoder_parameters: int
    parameters: int
    perplexity: float
    """On the gate's windows, as a multiple of the original's."""
    divergence: float
    """From the original, in nats per token."""
    agreement: float
    """Fraction of tokens for which both expect the same next one most."""
    exceeded: tuple[str, ...]
    """The gate's bounds that it does not keep, in words; none: it has passed."""
    seconds: float
    """Over all attempts."""
    model: str | None
    """Its model's folder, relative to the run folder; null unless `keep_steps`."""


class Records(_Facts):
    """SHA-256 digests of what the report stands on, for `rayprune verify`."""

    tasks: dict[str, str]
    """Of the manifest of every task, by name."""
    files: dict[str, str]
    """Of the files beside report.json."""


class Report(_Facts):
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
    parameters: Change[int]
    decoder_parameters: Change[int]
    bytes_on_disk: Change[int]
    perplexity: Perplexity | None
    """Null without a section `evaluation`, and of an encoder."""
    closeness: dict[str, Closeness] = {}
    """By model, `after` and `recovered`, on the windows of the perplexity."""
    masked_lm_loss: Change[float] | None = None
    """Nats for a masked token, of an encoder that predicts them; else there is no such key."""
    embeddings: Embeddings | None = None
    """Of an encoder that was evaluated; else there is no such key."""
    evaluation: Evaluation | None
    calibration: dict[str, Any]
    """The job's section `calibration`, defaults included."""
    recovery: dict[str, Any] | None = None
    """What was trained on after the cut, as in `calibration`; else there is no such key."""
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    """By stage, over all attempts, and `total`."""
    step_seconds: dict[str, float]
    """By step of the workers, all workers together, in the last attempt that did any."""
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
        """What only some jobs have is no key of other reports, rather than a null."""
        of_some = ("masked_lm_loss", "embeddings", "recovery")
        return {
            name: value
            for name, value in fields(self).items()
            if name not in of_some or value is not None
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
        raise SpecError(
            f"{run}: no {REPORT_FILE} here; name the folder of a finished run"
        ) from None
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
    if report.steps:
        yield step_table(report)
    if report.allocation:
        shown = {
            key.replace("_", " "): value
            for key, value in report.allocation.items()
            if key not in ("name", "by_generation")
        }
        yield f"allocation: {report.allocation['name']}, " + ", ".join(
            f"{key} {value:.6g}" for key, value in shown.items()
        )
    yield "seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in report.seconds.items())
    yield "peak memory: " + ", ".join(
        f"{name} {value / 2**30:.2f} GiB" for name, value in report.peak_memory_bytes.items()
    )
    yield from (f"warning: {warning}" for warning in report.warnings)
    other = f", not recovered: {report.pruned_model}" if report.recovered_model else ""
    yield f"model: {report.model}{other}, report: {report.page}"
    for target, folder in report.models.exports.items():
        yield f"{target}: {report.run / folder}"


def _changes(report: Report) -> Iterator[list[str]]:
    for name in ("parameters", "decoder_parameters", "bytes_on_disk"):
        yield _change(name, getattr(report, name), "{:,.0f}")
    if report.perplexity:
        yield _change("perplexity", report.perplexity, "{:.3f}")
    if report.masked_lm_loss:
        yield _change("masked_lm_loss", report.masked_lm_loss, "{:.4f}")


def _change(name: str, values: Change[Any], form: str) -> list[str]:
    return [name, form.format(values.before), form.format(values.after), f"{values.ratio:.4f}"]


def _measured(report: Report) -> Iterator[str]:
    """What else is to say of the evaluation."""
    if report.perplexity and (recovered := report.perplexity.recovered):
        yield (
            f"perplexity after recovery: {recovered:.3f}"
            f" ({recovered / report.perplexity.before:.4f} of before)"
        )
    yield from closeness_lines(report)
    if alike := report.embeddings:
        yield (
            f"embeddings: cosine with the dense model's {alike.cosine:.4f} on average, at least"
            f" {alike.least_cosine:.4f}"
        )
    if used := report.evaluation:
        what = "perplexity" if report.perplexity else "evaluation"
        yield (
            f"{what} of {used.path}: window {used.window}, stride {used.stride},"
            f" {used.windows} windows, {used.scored_tokens} scored tokens"
        )


def closeness_lines(report: Report) -> Iterator[str]:
    """How close the models are to the dense one."""
    for name, close in report.closeness.items():
        words = "pruned" if name == "after" else name
        yield (
            f"{words} model beside the dense one: KL divergence {close.divergence:.4f} nats for a"
            f" token, the same likeliest token for {close.agreement:.1%}"
        )


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


def _millions(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def layer_table(report: Report) -> Table:
    """What was kept in every layer, and how well the correction reproduces what was cut."""
    columns = ["layer", "group", "kept", "damping", "training error", "held-out error"]
    return Table("layers", columns, [row for layer in report.layers for row in _layer_rows(layer)])


def _layer_rows(layer: LayerReport) -> list[list[str]]:
    return [
        [
            str(layer.layer),
            titled(name),
            f"{group.kept}/{group.of}",
            f"{group.damping:g}",
            f"{group.training_error:.4f}",
            f"{group.held_out_error:.4f}",
        ]
        for name, group in layer.together.items()
    ]
