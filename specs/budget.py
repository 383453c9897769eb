"""How much of a model goes."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.allocation import AllocationSpec, UniformAllocation
from rayprune.specs.section import Section
from rayprune.specs.sizes import ByteSize
from rayprune.specs.texts import LocalPath

DEFAULT_SPARSITY = 0.2
LayerNumber = Annotated[int, Field(ge=0)]
TARGETS = (
    "sparsity",
    "parameters",
    "weight_bytes",
    "flops_per_token",
    "kv_bytes_per_token",
    "latency_ms",
    "tokens_per_second",
    "memory",
)
"""Options that each say how much goes."""
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

    @model_validator(mode="after")
    def _shapes_are_probed(self) -> Self:
        if self.kv_groups != "auto" or self.per_layer:
            shape = "per_layer chooses" if self.per_layer else "kv_groups says"
            self.leave_out(f"no shape is probed, {shape} it", "probe_samples", "probe_layers")
        return self

    @property
    def has_target(self) -> bool:
        """Whether there is anything that the pruned model has to meet."""
        return any(getattr(self, name) is not None for name in TARGETS)

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
        known = (*TARGETS, "drop_layers")
        if isinstance(options, Mapping) and all(options.get(name) is None for name in known):
            options = {**options, "sparsity": DEFAULT_SPARSITY}
        if isinstance(options, Mapping) and options.get("per_layer") is True:
            options = {"allocation": "curves", **options}
        return options
