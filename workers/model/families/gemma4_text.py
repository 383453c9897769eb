"""Gemma 4's text model, as of its dense 31B and of its 26B with experts: layers with a sliding
window, and every sixth, the last too, that sees all, with larger heads and fewer KV groups, whose
keys may be its values. Experts run beside an FFN, each behind norms of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Layer, Model
from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.family import MOST_LAYERS
from rayprune.workers.model.families.mixture import Experts, Mixture, Shared, packed
from rayprune.workers.model.families.parts import ATTENTION, NORMS_AROUND
from rayprune.workers.model.form import Form
from rayprune.workers.model.values import check_layer_types

_FULL, _SIZES = "full_attention", "per_layer_config"
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


def _of_layer(config: Config, layer: int) -> Config:
    """The config of one layer: those that see all have sizes of their own."""
    raw = {key: value for key, value in config.raw.items() if key != _SIZES}
    if _kind(config, layer) != _FULL:
        return replace(config, raw=raw)
    listed = config.raw.get(_SIZES)
    if isinstance(listed, Mapping):
        return replace(config, raw=raw | dict(listed.get(str(layer), {})))
    own: dict[str, object] = {"head_dim": config.integer("global_head_dim", 512)}
    groups = config.optional("num_global_key_value_heads")
    if groups and config.flag("attention_k_eq_v"):
        own["num_key_value_heads"] = groups
    return replace(config, raw=raw | own)


def _refused(config: Config) -> str | None:
    if config.raw.get("hidden_size_per_layer_input", 256):
        return (
            "hidden_size_per_layer_input is not supported: what its layers are given beside the"
            " hidden states depends on the tokens"
        )
    if config.raw.get("num_kv_shared_layers"):
        return "num_kv_shared_layers is not supported: layers read keys and values of others"
    if config.raw.get("use_bidirectional_attention") == "all":
        return "use_bidirectional_attention is not supported: statistics are those of a decoder"
    count = config.integer("num_hidden_layers", most=MOST_LAYERS)
    full = {str(layer) for layer in range(count) if _kind(config, layer) == _FULL}
    listed = config.raw.get(_SIZES)
    if listed is not None and not (
        isinstance(listed, Mapping)
        and listed.keys() == full
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
        made: dict[tuple[str, str], Layer] = {}
        layers = []
        model = super().describe(plain)
        for number in range(self.count_layers(config)):
            kind, own = _kind(config, number), _of_layer(config, number)
            found = (kind, str(self.heads(own)))
            if found not in made:
                made[found] = self._of_kind(own, kind)
            layers.append(made[found])
        return replace(model, layers=tuple(layers))

    def _of_kind(self, config: Config, kind: str) -> Layer:
        full = kind == _FULL
        shared = full and config.flag("attention_k_eq_v")
        producers = {n: p for n, p in ATTENTION.producers.items() if not (shared and "v_proj" in n)}
        family = replace(self, attention=replace(ATTENTION, producers=producers))
        layer = family._layer(config)
        attention, *others = layer.groups
        if full:
            attention = replace(attention, name="full_heads", title="KV groups of full attention")
        shapes = {**layer.shapes, "layer_scalar": (1,)}
        return replace(layer, groups=(attention, *others), shapes=shapes)

    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The keys that say that these layers stay."""
        listed = config.raw.get(_SIZES)
        own = listed if isinstance(listed, Mapping) else {}
        sizes = {str(new): own[str(n)] for new, n in enumerate(layers) if str(n) in own}
        return super().keeping(config, layers) | ({_SIZES: sizes} if own else {})

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """The family's own form with a smaller FFN."""
        self._check_heads(config, kept)
        return Form({"intermediate_size": kept["neurons"]})

    def _check_heads(self, config: Config, kept: Mapping[str, int]) -> None:
        groups = [group for group in self.describe(config).groups if group.kind == "attention"]
        if any(kept.get(group.name, group.num_units) != group.num_units for group in groups):
            raise SpecError(f"{config.model_type}: {_HEADS_STAY}")


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
