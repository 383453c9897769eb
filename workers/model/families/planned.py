"""Families that can be planned, not pruned yet: their layers' tensors and groups as data."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import (
    Axis,
    Block,
    Consumer,
    Group,
    Layer,
    Model,
    Shape,
    Shapes,
)
from rayprune.workers.model.families.family import MOST_LAYERS, Family
from rayprune.workers.model.families.parts import unit_parameters
from rayprune.workers.model.form import Form
from rayprune.workers.model.values import check_causal, check_values

_NORMS = ("input_layernorm", "post_attention_layernorm")
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Planned(Family):
    """A decoder with Llama's names outside its layers."""

    architecture: str
    not_pruned: str | None
    routers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def layers(self, config: Config) -> tuple[Layer, ...]:
        """Every layer; alike ones are one object."""

    def count_layers(self, config: Config) -> int:
        """How many layers a config says."""
        return config.integer("num_hidden_layers", most=MOST_LAYERS)

    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The key that says so many layers."""
        del config
        return {"num_hidden_layers": len(layers)}

    def describe(self, config: Config) -> Model:
        """The model that a config says."""
        check_causal(config)
        check_values(config)
        hidden, vocabulary = config.integer("hidden_size"), config.integer("vocab_size")
        tied = config.flag("tie_word_embeddings")
        outer: dict[str, Shape] = {_EMBEDDING: (vocabulary, hidden), _NORM: (hidden,)}
        return Model(
            model_type=config.model_type,
            auto_class="AutoModelForCausalLM",
            layers=self.layers(config),
            layers_at="model.layers",
            backbone="model",
            last_norm="model.norm",
            hidden=hidden,
            vocabulary=vocabulary,
            outer=outer | ({} if tied else {_HEAD: (vocabulary, hidden)}),
            embedding=_EMBEDDING,
            head=_HEAD,
            tied=tied,
            dtype=config.dtype,
            routers=self.routers,
            not_pruned=self.not_pruned,
            layers_differ=config.layers_differ,
        )

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """None yet."""
        del kept, target
        raise ModelError(f"model_type {config.model_type!r} can be planned but not pruned")

    def norm_shapes(self, hidden: int) -> dict[str, Shape]:
        """The two norms of a layer."""
        return {f"{name}.weight": (hidden,) for name in _NORMS}


def ffn_shapes(
    prefix: str, names: tuple[str, str, str], hidden: int, width: int
) -> dict[str, Shape]:
    """Shapes of a gated FFN whose gate, up and down are called `names`."""
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


def ffn_group(
    name: str, prefix: str, names: tuple[str, str, str], shapes: Shapes, count: tuple[int, int]
) -> Group:
    """The channels of FFNs of which the first has these names; `count`: how many, and how many a
    token passes through.
    """
    gate, up, down = (prefix + part for part in names)
    axes = (Axis(f"{gate}.weight", 0, 1), Axis(f"{up}.weight", 0, 1))
    consumer = Consumer(down, 1)
    return Group(
        name=name,
        kind="ffn",
        title="FFN channels" if name == "neurons" else f"channels of {name}",
        num_units=shapes[f"{gate}.weight"][0],
        axes=axes,
        consumer=consumer,
        block=Block(prefix.split(".")[0]),
        unit_parameters=unit_parameters(shapes, axes, consumer),
        count=count[0],
        active=count[1],
    )
