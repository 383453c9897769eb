"""The parts of a report: what is said of models, texts, layers, trainings and steps."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

N = TypeVar("N", int, float)


class Facts(BaseModel):
    """Base of all parts: frozen; what a newer version has written besides is kept."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
        protected_namespaces=(),
    )


class Change(Facts, Generic[N]):
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


class Embeddings(Facts):
    """How alike the pruned encoder's embeddings of the evaluation windows (the mean over their
    tokens) are to the dense one's.
    """

    cosine: float
    """Mean over the windows."""
    least_cosine: float
    """Of the window where they differ most."""


class Closeness(Facts):
    """How close a model's next-token distributions are to the dense one's."""

    divergence: float
    """KL divergence from the dense model's, in nats for a token."""
    agreement: float
    """Fraction of the tokens for which both expect the same one most."""


class Slice(Facts):
    """Some tokens of a text, by their place in the window or by how rare they are."""

    tokens: int
    ratio: float
    """Perplexity, as a multiple of the dense model's."""
    divergence: float
    agreement: float


class OnText(Facts):
    """What was measured of a model on one of the texts; what it has not is no key."""

    windows: int
    scored_tokens: int | None = None
    perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    slices: dict[str, Slice] | None = None
    masked_lm_loss: float | None = None
    cosine: float | None = None
    least_cosine: float | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was not measured has no key, rather than a null."""
        return {name: value for name, value in fields(self).items() if value is not None}


class Sample(Facts):
    """The beginning of a text, and how every model goes on with it."""

    prompt: str
    texts: dict[str, str]
    """By model: `before`, `after`, `recovered`."""


class Score(Facts):
    """What the models achieve in a task of lm-eval, by one metric; what is not known is no key."""

    task: str
    metric: str
    values: dict[str, float]
    """By model: `before`, `after`, `recovered`."""
    stderr: dict[str, float]
    """Standard errors likewise, of metrics for which lm-eval has them."""
    higher_is_better: bool | None = None
    documents: int | None = None
    """How many were asked; of a group each of its tasks tells."""
    few_shot: int | None = None
    """Examples before each question."""
    version: str
    """Of the task."""

    @property
    def name(self) -> str:
        """The task and the metric."""
        return f"{self.task} {self.metric}"

    def words(self, model: str) -> str:
        """The value of a model, with its standard error."""
        error = f" ± {self.stderr[model]:.4f}" if model in self.stderr else ""
        return f"{self.values[model]:.4f}{error}" if model in self.values else ""

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in fields(self).items() if value is not None}


class Models(Facts):
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


class Dense(Facts):
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


class Evaluation(Facts):
    """The protocol behind what was measured: numbers from different protocols cannot be compared.
    Other options of the job's section `evaluation` are here too.
    """

    path: str | None = None
    """The text; null: there are several, `texts`."""
    texts: dict[str, dict[str, Any]] | None = None
    tokenizer: str | None = None
    """Digest of the tokenizer's files."""
    tokens: str | None = None
    """Digest of the windows that were measured on."""
    window: int
    """Tokens of a window."""
    stride: int
    """Tokens between the starts of two windows."""
    opening: str = ""
    """What every window of a decoder begins with in place of its own tokens; empty: nothing."""
    windows: int
    scored_tokens: int = 0
    """Tokens that were predicted."""
    lm_eval: str | None = None
    """Its version, where models were asked its tasks."""
    tasks_batch: int = 1
    """Questions of it that a model is asked at once."""

    @property
    def files(self) -> str:
        """The texts, in words."""
        return self.path or ", ".join(text["path"] for text in (self.texts or {}).values())

    @property
    def begun(self) -> str:
        """With what windows begin, in words, behind how long they are."""
        return f", each begun with {self.opening}" if self.opening else ""


class GroupReport(Facts):
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
    mask_error: float | None = None
    """Of a site of matrices that got zeros: the same if no weight that stays had been corrected."""
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


class LayerReport(Facts):
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


class OwnText(Facts):
    """What the model has written itself to be calibrated on."""

    documents: int
    dropped: int
    """Documents that were loops, and are not among them."""
    tokens: int
    prompts: str | None = None
    """What the documents go on from; None: of an earlier version, which does not say."""


class Training(Facts):
    """The course of a training."""

    steps: tuple[int, ...]
    """Numbers of the steps that are shown: all, or some where they are many."""
    curves: dict[str, tuple[float, ...]]
    """Terms of the loss and the gradient's norm, a value for each of these steps."""
    tokens_per_second: float


class Span(Facts):
    """A stage on the time line of a run."""

    stage: str
    start: float
    """Seconds since the run began; attempts follow one another without a gap."""
    seconds: float
    busy: dict[str, float]
    """Seconds in steps, by worker."""


class StepReport(Facts):
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


class Records(Facts):
    """SHA-256 digests of what the report stands on, for `rayprune verify`."""

    tasks: dict[str, str]
    """Of the manifest of every task, by name."""
    files: dict[str, str]
    """Of the files beside report.json."""
