"""Gemma 4's text model: layers with a sliding window, and every sixth, the last too, that sees all,
with larger heads and fewer KV groups, whose keys may be its values.

In its 26B experts run beside an FFN, each behind norms of its own. In E2B and E4B every layer is
given an input of its own, made of the tokens, and the last layers have no keys and values: each
reads those of the last layer of its kind that has. Their FFN may be twice as wide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Axis, Group, Layer, Model, Shape
from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.family import MOST_LAYERS
from rayprune.workers.model.families.mixture import Experts, Mixture, Shared, packed
from rayprune.workers.model.families.parts import ATTENTION, NORMS_AROUND
from rayprune.workers.model.form import Form
from rayprune.workers.model.values import check_layer_types

_FULL, _SIZES, _WIDER = "full_attention", "per_layer_config", "use_double_wide_mlp"
_READERS = "num_kv_shared_layers"
_OWN = {"head_dim", "num_key_value_heads"}
"""What layers that see all have of their own."""
_HEADS_STAY = (
    "its layers with a sliding window and the others have KV groups of different kinds, but one"
    " number of query heads, so all heads have to stay"
)


def _kind(config: Config, layer: int) -> str:
    """The kind of a layer's attention; the class makes the last one see all."""
    given = config.raw.get("layer_types")
    if layer == config.integer("num_hidden_layers") - 1 or ((layer + 1) % 6 == 0 and not given):
        return _FULL
    return str(given[layer]) if isinstance(given, list) else "sliding_attention"


def _listed(config: Config) -> dict[int, Any] | None:
    """The sizes that the config gives layers by their numbers, which may be filled up with zeros
    (`05`); None: it gives none.
    """
    listed = config.raw.get(_SIZES)
    if listed is None:
        return None
    if not (isinstance(listed, Mapping) and all(str(number).isdecimal() for number in listed)):
        raise config.wrong(_SIZES, "a mapping of layer numbers to sizes")
    return {int(number): own for number, own in listed.items()}


def _of_layer(config: Config, layer: int) -> Config:
    """The config of one layer: those that see all have sizes of their own."""
    raw = {key: value for key, value in config.raw.items() if key != _SIZES}
    if _kind(config, layer) != _FULL:
        return replace(config, raw=raw)
    if (listed := _listed(config)) is not None:
        return replace(config, raw=raw | dict(listed.get(layer, {})))
    own: dict[str, object] = {"head_dim": config.integer("global_head_dim", 512)}
    groups = config.optional("num_global_key_value_heads")
    if groups and config.flag("attention_k_eq_v"):
        own["num_key_value_heads"] = groups
    return replace(config, raw=raw | own)


def _inputs(config: Config) -> int:
    """Numbers of a token that every layer is given beside the hidden states; 0: none."""
    key = "hidden_size_per_layer_input"
    return config.integer(key, 256) if config.raw.get(key, 256) else 0


def _first_reader(config: Config) -> int:
    """The first of the layers that read keys and values of others; the number of layers: none
    does.
    """
    count = config.integer("num_hidden_layers", most=MOST_LAYERS)
    return count - (config.integer(_READERS) if config.raw.get(_READERS) else 0)


def _refused_readers(config: Config) -> str | None:
    count, first = config.integer("num_hidden_layers", most=MOST_LAYERS), _first_reader(config)
    kinds = [_kind(config, layer) for layer in range(count)]
    if not set(kinds) <= set(kinds[: max(first, 0)]):
        return (
            f"{_READERS} leaves no layer of some kind whose keys and values the others could read"
        )
    if first < count and not _inputs(config):
        return (
            f"{_READERS} is not supported without hidden_size_per_layer_input: its class fails on"
            " it"
        )
    if config.flag(_WIDER) and config.flag("enable_moe_block"):
        return f"{_WIDER} is not supported with enable_moe_block"
    return None


def _refused(config: Config) -> str | None:
    if problem := _refused_readers(config):
        return problem
    count = config.integer("num_hidden_layers", most=MOST_LAYERS)
    full = {layer for layer in range(count) if _kind(config, layer) == _FULL}
    listed = _listed(config)
    if listed is not None and not (
        listed.keys() == full
        and all(isinstance(own, Mapping) and own.keys() <= _OWN for own in listed.values())
    ):
        return f"{_SIZES} must give {' and '.join(sorted(_OWN))} of each layer with full attention"
    return None


class Gemma4(Decoder):
    """A decoder whose layers have attention of two kinds."""

    def of(self, config: Config) -> Decoder:
        """The family as it is with a config: a mixture of experts, if it says so."""
        return MIXTURE if config.flag("enable_moe_block") else self

    def describe(self, config: Config) -> Model:
        """The model that a config says."""
        check_layer_types(config, self.count_layers(config))
        if problem := _refused(config):
            raise ModelError(f"{config.file}: {problem}")
        plain = replace(config, raw={k: v for k, v in config.raw.items() if k != _SIZES})
        made: dict[tuple[str, str, bool], Layer] = {}
        layers, first = [], _first_reader(config)
        for number in range(self.count_layers(config)):
            kind, own = _kind(config, number), _of_layer(config, number)
            found = (kind, str(self.heads(own)), number >= first)
            if found not in made:
                made[found] = self._of_kind(own, kind, number >= first)
            layers.append(made[found])
        model = replace(super().describe(plain), layers=tuple(layers))
        if given := _inputs(config):
            model = self._with_inputs(config, model, given)
        return self._with_readers(config, model, first) if first < len(layers) else model

    def _with_inputs(self, config: Config, model: Model, given: int) -> Model:
        """With what makes the inputs of all layers of the tokens."""
        together = model.num_layers * given
        tokens = config.integer("vocab_size_per_layer_input", 262_144)
        shapes = {
            "embed_tokens_per_layer.weight": (tokens, together),
            "per_layer_model_projection.weight": (together, model.hidden),
            "per_layer_projection_norm.weight": (given,),
        }
        outer = {f"{model.backbone}.{name}": shape for name, shape in shapes.items()}
        table, projection, _ = outer
        return replace(
            model,
            outer={**model.outer, **outer},
            token_inputs=given,
            layer_axes=(Axis(table, 1, given), Axis(projection, 0, given)),
        )

    def _with_readers(self, config: Config, model: Model, first: int) -> Model:
        """With layers that read keys and values of others. Published files hold matrices of theirs,
        which the class never reads.
        """
        read = {_kind(config, layer): layer for layer in range(first)}
        sizes = [self.heads(_of_layer(config, layer)) for layer in read.values()]
        unread = tuple(
            f"{model.prefix(layer)}self_attn.{name}."
            for layer in range(first, model.num_layers)
            for name in ("k_proj", "v_proj", "k_norm")
        )
        return replace(
            model,
            for_later={"shared_kv_states": sum(2 * size.groups * size.size for size in sizes)},
            others_stay=dict.fromkeys(read.values(), "others read its keys and values"),
            left_out=(*model.left_out, *unread),
            why_left_out="layers that read keys and values of others are left out: nothing reads"
            " them",
        )

    def _of_kind(self, config: Config, kind: str, reads: bool) -> Layer:
        """A layer of a kind; `reads`: the keys and values of another one."""
        full = kind == _FULL
        shared = full and config.flag("attention_k_eq_v")
        absent = {"k_proj", "v_proj"} if reads else {"v_proj"} if shared else set[str]()
        producers = {
            name: rows
            for name, rows in ATTENTION.producers.items()
            if name.removeprefix("self_attn.") not in absent
        }
        family = replace(
            self,
            attention=replace(ATTENTION, producers=producers),
            head_norms=self.head_norms[:1] if reads else self.head_norms,
        )
        wider = reads and config.flag(_WIDER)
        if wider:
            sizes = {"intermediate_size": 2 * self.width(config)}
            config = replace(config, raw={**config.raw, **sizes})
        layer = family._layer(config)
        attention, *others = layer.groups
        if full:
            attention = replace(attention, name="full_heads", title="KV groups of full attention")
        if reads:
            attention = replace(attention, cached=0)
        if wider:
            others = [_wider(group) for group in others]
        shapes = {**layer.shapes, "layer_scalar": (1,)} | _shapes_of_inputs(config)
        return replace(layer, groups=(attention, *others), shapes=shapes)

    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The keys that say that these layers stay."""
        own = _listed(config) or {}
        sizes = {str(new): own[number] for new, number in enumerate(layers) if number in own}
        readers = sum(layer >= _first_reader(config) for layer in layers)
        changes = super().keeping(config, layers) | ({_SIZES: sizes} if own else {})
        return changes | ({_READERS: readers} if _READERS in config.raw else {})

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """The family's own form with a smaller FFN."""
        self._check_heads(config, kept)
        return Form({"intermediate_size": kept["neurons"]})

    def _check_heads(self, config: Config, kept: Mapping[str, int]) -> None:
        groups = [group for group in self.describe(config).groups if group.kind == "attention"]
        if any(kept.get(group.name, group.num_units) != group.num_units for group in groups):
            raise SpecError(f"{config.model_type}: {_HEADS_STAY}")


def _wider(group: Group) -> Group:
    """The FFN of a layer that is twice as wide as the others."""
    title = "FFN channels of layers that read keys and values"
    return replace(group, name="wide_neurons", title=title, times=("neurons", 2))


def _shapes_of_inputs(config: Config) -> dict[str, Shape]:
    """The tensors of a layer that work on its input."""
    if not (given := _inputs(config)):
        return {}
    hidden = config.integer("hidden_size")
    return {
        "per_layer_input_gate.weight": (given, hidden),
        "per_layer_projection.weight": (hidden, given),
        "post_per_layer_input_norm.weight": (hidden,),
    }


@dataclass(frozen=True)
class Gemma4Mixture(Gemma4, Mixture):
    """The same with experts beside the FFN."""

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """The family's own form with fewer experts, and smaller ones and a smaller FFN."""
        self._check_heads(config, kept)
        return Mixture.form(self, config, kept, target)


_COMMON: dict[str, Any] = {
    "architecture": "Gemma4ForCausalLM",
    "head_norms": ("self_attn.q_norm", "self_attn.k_norm"),
    "biased": biased_by(attention_bias="self_attn."),
    "scale": lambda config: None,
    "heads_stay": _HEADS_STAY,
    "last_stays": "its class makes it see all, whichever it is",
    "values_of_layer": lambda config, layer: {"layer_types": _kind(config, layer)},
    "sized_alike": "its config says of every layer what attention it has, and takes no other sizes",
    "tied": True,
    "groups": 4,
    "head_size": 256,
}
MIXTURE = Gemma4Mixture(
    **_COMMON,
    norms=(
        *NORMS_AROUND,
        "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_2",
    ),
    experts=Experts(
        count=("num_experts",),
        active="top_k_experts",
        at="experts",
        router=("router.proj.weight", "router.per_expert_scale"),
        places=packed("experts", ("experts.gate_up_proj", "experts.down_proj")),
    ),
    shared=Shared(
        "mlp",
        width=lambda config: config.integer("intermediate_size"),
        key="intermediate_size",
        first=True,
        beside={"router.scale": lambda hidden: (hidden,)},
    ),
)
FAMILY = Gemma4(**_COMMON, norms=NORMS_AROUND)
