"""The job: every option of a run, with its unit and its bounds.

All models are frozen and closed: an unknown key is an error, and a validated job never changes.
A field's docstring is its documentation in the JSON schema.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rayprune.specs.allocation import AllocationSpec, CurvesAllocation, UniformAllocation
from rayprune.specs.cluster import ClusterSpec, ParallelSpec
from rayprune.specs.methods import MethodSpec
from rayprune.specs.methods.options import InSteps
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.specs.own_text import OwnTextSpec
from rayprune.specs.recipe import RecipeName
from rayprune.specs.section import FloatType, Section
from rayprune.specs.texts import (
    LocalPath,
    MixedTextSpec,
    PathMarker,
    TextFormat,
    TextSpec,
    WindowsSpec,
)
from rayprune.specs.training import HOW_TRAINED, RecoverSpec

_UNITS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def parse_bytes(value: object) -> object:
    """Turn `8GiB`, `500 MB` or a plain integer into bytes.

    Raises:
        ValueError: the text is no number with a known unit.
    """
    if not isinstance(value, str):
        return value
    number = value.strip().rstrip("iBbKkMmGgTt").strip()
    unit = value.strip()[len(number) :].strip().lower() or "b"
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(
            f"{value!r} is not a size; write for example 8GiB, 500MB or a number of bytes"
        ) from None


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


ModelPath = Annotated[str, Field(min_length=1), PathMarker(or_name=True)]
ByteSize = Annotated[
    int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(ge=1)
]


class ModelSpec(Section):
    """The model to prune."""

    path: ModelPath
    """Folder with `config.json`, the tokenizer and safetensors weights; or, where there is no such
    folder, OWNER/NAME on the Hugging Face Hub: it is fetched into the Hub's cache.
    """
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Branch, tag or commit on the Hub; null: main. The commit is part of the result."""
    dtype: FloatType = "auto"
    """Floating-point type of the forward passes; `auto`: the checkpoint's own on a GPU, float32 on
    a CPU.
    """

    @property
    def on_hub(self) -> bool:
        """Whether it is still a name, not a folder."""
        return not os.path.isabs(self.path)

    @model_validator(mode="after")
    def _revision_of_a_name(self) -> Self:
        if self.revision is not None and not self.on_hub:
            raise ValueError(
                f"revision {self.revision!r} is of a name on the Hub, but path is a folder: leave"
                " one of them out"
            )
        return self


class CalibrationSpec(WindowsSpec):
    """The text whose activations decide what is kept."""

    own: OwnTextSpec | None = None
    """Text that the model writes itself, as the last text of the mix; null: none."""
    shards: int = Field(default=8, ge=2, le=4096)
    """Number of logical shards the windows are split into, in order; at most one worker per shard.
    Part of the result.
    """
    held_out_shards: int = Field(default=1, ge=1)
    """How many of the last shards are held out while the damping is chosen (the final fit uses all
    of them).
    """

    @model_validator(mode="after")
    def _shards_fit(self) -> Self:
        if self.shards > self.samples:
            raise ValueError(f"shards ({self.shards}) must not exceed samples ({self.samples})")
        if self.held_out_shards >= self.shards:
            raise ValueError(
                f"held_out_shards ({self.held_out_shards}) must be smaller than shards"
                f" ({self.shards})"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of the texts, and last the one of the model's own, as long as it is not written."""
        return (*super().weights, *([self.own.weight] if self.own else []))

    def with_own(self, path: str) -> "CalibrationSpec":
        """The same where the model's own text lies in a file: one more of the mix, whose documents
        are read as the tokens that the model has written.
        """
        if self.own is None:
            return self
        text = MixedTextSpec(path=path, format="jsonl", field="input_ids", weight=self.own.weight)
        return self.model_copy(update={"mix": (*self.mix, text), "own": None})


DEFAULT_SPARSITY = 0.2
LayerNumber = Annotated[int, Field(ge=0)]
_TARGETS = (
    "sparsity",
    "parameters",
    "weight_bytes",
    "flops_per_token",
    "kv_bytes_per_token",
    "latency_ms",
    "tokens_per_second",
    "memory",
)
SPEEDS = ("latency_ms", "tokens_per_second")
"""Targets that are counted with a table."""


class SpeedSpec(Section):
    """Tokens per second, at least, counted with `latency_table`: one of the two or both."""

    prefill: Annotated[float, Field(gt=0.0)] | None = None
    """While prompts are read, over all sequences."""
    decode: Annotated[float, Field(gt=0.0)] | None = None
    """While tokens are written, over all sequences."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Sequences at once; null: as the table has it, if it has one number alone."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Of a prompt, or before the token that is written; null: as the table has it."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.prefill is None and self.decode is None:
            raise ValueError("tokens_per_second asks for nothing; give prefill, decode or both")
        return self


class ServedMemorySpec(Section):
    """Memory where the model is served."""

    bytes: ByteSize
    """Of the weights and the KV cache together, at most. A matrix of 16-bit numbers to which
    `method: sparse` gives 2:4 zeros counts as a GPU holds it: 9/16 of its bytes.
    """
    batch: int = Field(default=1, ge=1)
    """Sequences in the cache."""
    context: int = Field(ge=0)
    """Tokens of each; 0: the weights alone."""

    @model_validator(mode="after")
    def _batch_of_something(self) -> Self:
        if self.context == 0 and self.batch > 1:
            raise ValueError(
                f"batch: {self.batch} sequences of context 0 hold nothing; leave it out"
            )
        return self


class BudgetSpec(Section):
    """How much goes. Every target that is given is met."""

    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Fraction of the decoder-layer parameters removed, at least; null: 0.2, or no such target
    where another one, or `drop_layers`, is given.
    """
    parameters: Annotated[int, Field(ge=1)] | None = None
    """Parameters of the whole model, at most."""
    weight_bytes: ByteSize | None = None
    """Bytes of the weights on disk, at most."""
    flops_per_token: Annotated[float, Field(gt=0.0)] | None = None
    """Floating-point operations of the products with all weight matrices for one token, at most."""
    kv_bytes_per_token: ByteSize | None = None
    """Bytes that the KV cache takes for one token, at most."""
    latency_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Milliseconds of a forward pass over a prompt, at most, counted with `latency_table`."""
    tokens_per_second: SpeedSpec | None = None
    """Speed while prompts are read and tokens are written, counted with `latency_table`."""
    memory: ServedMemorySpec | None = None
    """Weights and KV cache together where the model is served."""
    latency_table: LocalPath | None = None
    """Times of the model's layers by size on the machine that matters, as `rayprune latency` has
    measured them.
    """
    per_layer: bool = False
    """Layers may keep different numbers of units; stock model classes load such a model only if
    `export.pad` is set.
    """
    allocation: AllocationSpec = UniformAllocation()
    """How the budget is spread over the layers; all but `uniform` need `per_layer`, which by itself
    means `curves`.
    """
    round_to: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """The FFN width that stays is a multiple of this, in channels; `auto`: 256 for an FFN of 10,240
    channels or more, 64 from 1,024 on, else 32, and the heads that stay are multiples too.
    """
    kv_groups: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """KV groups that stay in every layer; `auto`: chosen against the FFN width by predicted output
    error.
    """
    experts: Annotated[int, Field(ge=1)] | None = None
    """Experts that stay in every layer of a mixture of experts; null: all, or with `per_layer` as
    many in each layer as suit it.
    """
    expert_score: Literal["reap", "frequency"] = "reap"
    """Which experts stay: those that add most to the tokens they get (`reap`), or get most tokens
    (`frequency`).
    """
    drop_layers: (
        Annotated[int, Field(ge=1)] | Annotated[list[LayerNumber], Field(min_length=1)] | None
    ) = None
    """Whole layers that go, without training: their numbers, from 0, or how many, the least useful
    by `drop_score`. What they hold counts first, heads and widths give what a target is short of;
    without a target nothing else goes. null: none.
    """
    drop_score: Literal["influence", "divergence"] = "influence"
    """Which layers go: those that turn the hidden states least (`influence`, ShortGPT's Block
    Influence), or one after the other that without which the outputs lie nearest to the dense
    model's (`divergence`).
    """
    drop_samples: int = Field(default=8, ge=1, le=4096)
    """Calibration windows on which that is measured; at most all."""
    probe_samples: int = Field(default=4, ge=2, le=4096)
    """Calibration windows used to predict output errors when `kv_groups` is `auto`."""
    probe_layers: int = Field(default=5, ge=1, le=4096)
    """Layers, evenly spaced, at which output errors are predicted when `kv_groups` is `auto`."""

    @model_validator(mode="after")
    def _latency_is_counted(self) -> Self:
        for name in SPEEDS:
            if getattr(self, name) is not None and not self.latency_table:
                raise ValueError(
                    f"{name} needs latency_table: write one with `rayprune latency MODEL > FILE`"
                )
        return self

    @model_validator(mode="after")
    def _experts_are_scored(self) -> Self:
        if self.experts is None and not self.per_layer and self.expert_score != "reap":
            raise ValueError(
                "expert_score needs experts, how many stay, or per_layer; set one of them, or leave"
                " it out"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_dropped(self) -> Self:
        drop, measured = self.drop_layers, ("influence", 8)
        if not isinstance(drop, int) and (self.drop_score, self.drop_samples) != measured:
            raise ValueError(
                "drop_score and drop_samples need drop_layers: how many go; leave them out, or"
                " give a number"
            )
        if isinstance(drop, list) and len(set(drop)) < len(drop):
            raise ValueError(f"drop_layers names a layer twice: {drop}")
        narrower = self.kv_groups != "auto" or self.experts is not None or self.per_layer
        if drop is not None and narrower and not self.has_target:
            raise ValueError(
                "drop_layers without a target removes layers and nothing else; leave out kv_groups,"
                " experts and per_layer, or give a target, as sparsity"
            )
        return self

    @property
    def has_target(self) -> bool:
        """Whether there is anything that the pruned model has to meet."""
        return any(getattr(self, name) is not None for name in _TARGETS)

    @model_validator(mode="after")
    def _layers_may_differ(self) -> Self:
        if self.per_layer == (self.allocation.name == "uniform"):
            change = (
                "leave budget.allocation out, or set budget.per_layer: false"
                if self.per_layer
                else "set budget.per_layer: true"
            )
            raise ValueError(
                f"allocation {self.allocation.name} with per_layer {str(self.per_layer).lower()};"
                f" {change}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _depend_on_others(cls, options: object) -> object:
        known = (*_TARGETS, "drop_layers")
        if isinstance(options, Mapping) and all(options.get(name) is None for name in known):
            options = {**options, "sparsity": DEFAULT_SPARSITY}
        if isinstance(options, Mapping) and options.get("per_layer") is True:
            options = {"allocation": "curves", **options}
        return options


FEW_TOKENS = 10
"""Calibration tokens per FFN channel below which corrections overfit, measured on SmolLM2-135M
(docs/methods/stat.md).
"""


class CorrectionSpec(Section):
    """The least-squares correction that is folded into the next weight."""

    damping: Annotated[float, Field(ge=0.0, le=1e6)] | Literal["held-out"] = "held-out"
    """Ridge added to the statistic, as a multiple of its mean diagonal; `held-out`: the candidate
    with the least held-out error.
    """
    candidates: tuple[Annotated[float, Field(gt=0.0, le=1e6)], ...] = Field(
        default=(1e-3, 1e-2, 3e-2, 1e-1, 3e-1), min_length=1, max_length=32
    )
    """Damping values tried when `damping` is `held-out`, as multiples of the mean diagonal; from
    the largest down, until the held-out error rises.
    """
    drift: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of what the residual stream has drifted from the dense model's that every block's
    correction also makes up for.
    """


class MemorySpec(Section):
    """What a worker may hold."""

    worker: ByteSize | None = None
    """Memory of one worker in bytes (or `8GiB`); activations are recomputed instead of kept when
    they do not fit. null: no limit.
    """
    checkpoint_layers: int = Field(default=4, ge=0, le=10_000)
    """Hidden states are saved every so many layers, so that a restart replays fewer layers; 0:
    never.
    """


Target = Literal["transformers", "transformers-4", "vllm", "ctranslate2", "gguf", "gguf-q8_0"]


def one_or_more(value: object) -> object:
    """A value that stands alone as a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class ExportSpec(Section):
    """What the pruned model's folder looks like."""

    dtype: FloatType = "auto"
    """Floating-point type on disk; `auto`: as each tensor is in the original."""
    target: Annotated[
        tuple[Target, ...],
        BeforeValidator(one_or_more, json_schema_input_type=Target | tuple[Target, ...]),
        Field(min_length=1),
    ] = ("transformers",)
    """Engines it is written for, one or a list. `transformers` is there always, in `model`;
    `transformers-4`: what 4.57 cannot read is refused; `vllm`: a Qwen2 with fewer heads is written
    as a Llama, layers of different sizes in `export/vllm`; `ctranslate2`: a Llama with heads
    of another size than hidden size / heads is written as a Mistral, what CTranslate2 would
    misread is refused; `gguf`, `gguf-q8_0`: a file for llama.cpp in F16 or Q8_0, in `export`
    (extra `gguf`).
    """
    tensor_parallel: int = Field(default=1, ge=1, le=256)
    """GPUs that every layer will be split over where the model is served: each gets as many KV
    groups, and a multiple of `budget.round_to` of the FFN.
    """
    pad: bool = False
    """Layers of different sizes are padded with zeros to the widest: stock classes load the model,
    but it takes what the widest takes.
    """

    @property
    def form(self) -> str:
        """What the model's folder is written for: one that another engine reads is one of
        transformers too, and one of CTranslate2 one of vLLM.
        """
        others = (target for target in ("ctranslate2", "vllm") if target in self.target)
        return next(others, "transformers")


TextName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class EvaluationSpec(Section):
    """Perplexity of the dense and of the exported model, under the same code, and how close they
    are; of an encoder how alike its embeddings are, and its loss on masked tokens if it predicts
    them.
    """

    path: LocalPath | None = None
    """The text, as in `calibration`; null: `texts` has several."""
    format: TextFormat = "auto"
    """As in `calibration`."""
    field: Annotated[str, Field(min_length=1)] | None = None
    """As in `calibration`."""
    texts: dict[TextName, TextSpec] | None = None
    """Texts by name, in place of `path`: each is measured by itself, and all of them together."""
    window: int = Field(default=1024, ge=2, le=1_048_576)
    """Length of one window, in tokens."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between the starts of two windows; null: the window's length (no overlap)."""
    max_windows: int | None = Field(default=None, ge=1)
    """Only the first so many windows of each text; null: all. An incomplete last window is
    dropped.
    """
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=32)
    """Beginnings of texts that the dense and the pruned model go on with, for the report; each
    takes the likeliest token.
    """
    prompt_tokens: int = Field(default=48, ge=1, le=4096)
    """Tokens that they go on with, at most."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of lm-eval by their names, or groups of them, that every model is asked."""
    tasks_folder: LocalPath | None = None
    """Folder with tasks of your own, as YAML and data; its names go before lm-eval's."""
    tasks_limit: int | None = Field(default=None, ge=1)
    """Only the first so many documents of each task; null: all."""
    tasks_batch: int = Field(default=1, ge=1, le=1024)
    """Questions that a model is asked at once."""
    few_shot: int | None = Field(default=None, ge=0, le=1024)
    """Examples before each question; null: as many as the task says."""

    @property
    def by_name(self) -> dict[str, TextSpec]:
        """The texts; one that stands alone has the name of its file."""
        if self.path is None:
            return dict(self.texts or {})
        alone = TextSpec(path=self.path, format=self.format, field=self.field)
        return {os.path.basename(os.path.normpath(self.path)) or "text": alone}

    def option(self, name: str) -> str:
        """The option that says where the text of this name lies."""
        return "evaluation.path" if self.texts is None else f"evaluation.texts.{name}.path"

    @property
    def effective_stride(self) -> int:
        """Tokens between the starts of two windows."""
        return self.stride or self.window

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.path is None) == (not self.texts):
            raise ValueError("give either path, or texts by name: texts: {NAME: {path: FILE}}")
        if self.texts and (self.format, self.field) != ("auto", None):
            raise ValueError("with texts, format and field belong to each of them: move them there")
        return self

    @model_validator(mode="after")
    def _tasks_for_their_options(self) -> Self:
        idle = self.given("few_shot", "tasks_batch", "tasks_folder", "tasks_limit")
        if idle and not self.tasks:
            raise ValueError(f"{idle[0]}: there are no tasks; give tasks: [NAME], or leave it out")
        return self

    @model_validator(mode="after")
    def _stride_within_window(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride ({self.stride}) must not exceed window ({self.window})")
        return self


class JobSpec(Section):
    """One pruning job."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    recipe: RecipeName | None = None
    """A bundle of defaults for an aim, over which all that the job says itself wins; null: none."""
    model: ModelSpec
    calibration: CalibrationSpec
    budget: BudgetSpec = BudgetSpec()
    method: MethodSpec = StatOptions()
    correction: CorrectionSpec = CorrectionSpec()
    parallel: ParallelSpec = ParallelSpec()
    memory: MemorySpec = MemorySpec()
    export: ExportSpec = ExportSpec()
    recover: RecoverSpec | None = None
    evaluation: EvaluationSpec | None = None
    cluster: ClusterSpec = ClusterSpec()

    @model_validator(mode="after")
    def _probe_fits(self) -> Self:
        if self.budget.kv_groups == "auto" and self.budget.probe_samples > self.calibration.samples:
            raise ValueError(
                f"budget.probe_samples ({self.budget.probe_samples}) must not exceed"
                f" calibration.samples ({self.calibration.samples})"
            )
        if self.method.removes_layers and self.budget.kv_groups != "auto":
            raise ValueError(
                f"method {self.method.name} removes whole layers; leave out budget.kv_groups"
            )
        has_own_way = self.method.removes_layers or self.steps or self.method.cuts_first
        if self.budget.drop_layers is not None and has_own_way:
            raise ValueError(
                f"budget.drop_layers: method {self.method.name} has a way of its own; leave it out,"
                " or drop the layers in a run before, without a target"
            )
        if self.method.trainings and (self.budget.per_layer or self.parallel.placement == "layers"):
            raise ValueError(
                f"method {self.method.name} leaves out budget.per_layer and parallel.placement: it"
                " has one way of its own"
            )
        if self.method.trains_layers_alone:
            wanted = max(training.samples or 0 for training in self.method.trainings)
            if wanted > self.calibration.samples:
                raise ValueError(
                    f"method.training.samples ({wanted}) must not exceed calibration.samples"
                    f" ({self.calibration.samples})"
                )
        if self.budget.allocation.name == "threshold" and not self.method.comparable_scores:
            raise ValueError(
                f"budget.allocation: threshold: the scores of {self.method.name} cannot be compared"
                " between layers; use curves"
            )
        if self.correction.drift and self.parallel.effective_propagation == "dense":
            raise ValueError(
                "correction.drift: on the dense path nothing drifts; set it to 0, or"
                " parallel.propagation to pruned or refit"
            )
        if self.parallel.placement == "shards" and self.parallel.workers > self.calibration.shards:
            raise ValueError(
                f"parallel.workers ({self.parallel.workers}) must not exceed calibration.shards"
                f" ({self.calibration.shards}): a shard is the unit of work; raise"
                " calibration.shards"
            )
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> Self:
        if self.parallel.transport != "collective":
            return self
        unread = {
            "cluster.executor: in-process": self.cluster.executor == "in-process",
            f"method {self.method.name}": self.method.removes_nothing
            or (self.method.masks is not None and self.method.cuts_first is None),
        }
        if given := [what for what, is_given in unread.items() if is_given]:
            raise ValueError(
                f"parallel.transport: collective: with {given[0]} workers exchange no statistics of"
                " groups; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_removed(self) -> Self:
        if not self.method.removes_nothing:
            return self
        if self.recover is None:
            raise ValueError(
                f"method {self.method.name} removes nothing, and without a section recover nothing"
                " is trained: add recover, or choose a method"
            )
        given = {
            "budget": self.budget != BudgetSpec(),
            "correction": self.correction != CorrectionSpec(),
            "parallel.placement": self.parallel.placement != "shards",
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"method {self.method.name} removes nothing; leave out {names[0]}")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if (steps := self.steps) is None:
            return self
        others = [name for name in _TARGETS[1:] if getattr(self.budget, name) is not None]
        if others or self.budget.sparsity is None:
            given = f"leave out budget.{others[0]}" if others else "give budget.sparsity"
            raise ValueError(
                f"method {self.method.name}: its steps are fractions of the decoder's parameters:"
                f" {given}"
            )
        if steps.sparsities[-1] != self.budget.sparsity:
            raise ValueError(
                f"method.schedule: ends at {steps.sparsities[-1]:g}, but budget.sparsity is"
                f" {self.budget.sparsity:g}; give both the same"
            )
        if self.export.dtype != "auto" and self.model.dtype == "auto":
            raise ValueError(
                f"method {self.method.name} with export.dtype: steps read what the ones before have"
                " written; set model.dtype too"
            )
        return self

    @model_validator(mode="after")
    def _own_samples_fit(self) -> Self:
        if self.steps and self.more_own_samples:
            raise ValueError(
                f"recover.own_samples: method {self.method.name} measures its gate on these"
                " windows; leave it out, or raise recover.samples"
            )
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        if self.method.masks is None:
            return self
        alone, budget = self.method.cuts_first is None, self.budget
        unread = {
            "budget": (alone and budget != BudgetSpec(), "without method.inner no unit goes"),
            "budget.per_layer": (budget.per_layer, "layers that differ in size get no zeros"),
            "budget.latency_table": (
                budget.latency_table is not None,
                "its times are those of matrices without zeros",
            ),
            "correction": (
                alone and self.correction != CorrectionSpec(),
                "method.damping is its own",
            ),
            "recover": (self.recover is not None, "a training would fill the zeros"),
            "export.pad": (self.export.pad, "all layers are alike"),
            "parallel.placement: layers": (
                self.parallel.placement == "layers",
                "zeros are made layer after layer",
            ),
        }
        for option, (given, reason) in unread.items():
            if given:
                raise ValueError(f"method {self.method.name}: {reason}; leave out {option}")
        return self

    @property
    def steps(self) -> InSteps | None:
        """The passes over the model, where they are several."""
        return self.method.in_steps(self.budget.sparsity or 0.0)

    @property
    def trains_on_ranks(self) -> bool:
        """Whether a gang of ranks trains the whole model, before the cut or after it."""
        return (self.recover is not None and self.recover.scope == "model") or (
            len(self.method.trainings) > 0 and not self.method.trains_layers_alone
        )

    @property
    def sizes_differ(self) -> bool:
        """Whether layers are written in sizes of their own."""
        return self.budget.per_layer and not self.export.pad

    @property
    def converted(self) -> tuple[str, ...]:
        """Targets that get a folder of their own beside the model's."""
        own = ("gguf", "gguf-q8_0", *(["vllm"] if self.sizes_differ else []))
        return tuple(target for target in dict.fromkeys(self.export.target) if target in own)

    @property
    def own_dtype(self) -> FloatType:
        """Type in which the model writes text of its own; `auto`: as of its forward passes."""
        own = self.calibration.own
        return self.model.dtype if own is None or own.dtype == "auto" else own.dtype

    @property
    def more_own_samples(self) -> int:
        """Windows of the model's own text that a recovery takes beyond the calibration's."""
        return self.recover.own_samples if self.recover and self.calibration.own else 0

    @property
    def windows_read(self) -> int:
        """Windows that are read of the calibration text: those of the calibration, or of the
        training that takes most.
        """
        trainings = [*self.method.trainings, *([self.recover] if self.recover else [])]
        return max(self.calibration.samples, *(training.samples or 0 for training in trainings), 0)

    @property
    def recovery_text(self) -> WindowsSpec:
        """What a recovery is trained on, as many windows as it takes.

        Raises:
            ValueError: the job has none.
        """
        if self.recover is None:
            raise ValueError("the job has no section recover")
        samples = self.recover.samples or self.calibration.samples
        return self.recover.text or self.calibration.model_copy(update={"samples": samples})

    @property
    def recovery_option(self) -> str:
        """Where the job says what a recovery is trained on."""
        return "recover.text" if self.recover and self.recover.text else "calibration"

    @property
    def divergence_windows(self) -> int:
        """Calibration windows on which divergences are measured for an allocation, at least one of
        every text; 0: none.
        """
        allocation, calibration = self.budget.allocation, self.calibration
        if not isinstance(allocation, CurvesAllocation):
            return 0
        return min(max(allocation.samples, len(calibration.weights)), calibration.samples)

    @property
    def drop_windows(self) -> int:
        """Calibration windows on which is measured which layers go; 0: none."""
        measured = isinstance(self.budget.drop_layers, int)
        return min(self.budget.drop_samples, self.calibration.samples) if measured else 0

    @property
    def gradient_windows(self) -> int:
        """Calibration windows on which gradients of the loss are measured; 0: none."""
        return min(self.method.selector.gradient_windows, self.calibration.samples)

    @property
    def selects_first(self) -> bool:
        """Whether the units that stay are chosen in a pass of their own, before the sweep."""
        return self.method.selects_first or self.parallel.effective_propagation == "refit"

    def result_part(self) -> dict[str, object]:
        """The options the pruned model depends on: all but where, with how many workers, how it is
        judged and what is done with it.
        """
        left_out: Any = {
            "cluster": True,
            "evaluation": True,
            "memory": True,
            "recipe": True,  # what it gives stands in the other fields
            "recover": True,
            "parallel": {"workers", "transport", "retries", "step_seconds"},
        }
        left_out["method"] = {"training": HOW_TRAINED, "gates": HOW_TRAINED}
        document: dict[str, object] = self.model_dump(mode="json", exclude=left_out)
        return document
