"""Llama 4's text model: experts beside a shared FFN, in every layer or in some; every fourth layer
sees all and has no rotary positions, the others see chunks.

What an expert is given is multiplied by the router's weight, not what it returns.
"""

from collections.abc import Sequence
from dataclasses import replace

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import biased_by
from rayprune.workers.model.families.mixture import Dense, Experts, Mixture, Shared, packed
from rayprune.workers.model.families.parts import Keys, Part
from rayprune.workers.model.values import rotates

_AT = "feed_forward"


def _is_dense(config: Config, layer: int) -> bool:
    listed = config.raw.get("moe_layers")
    if listed is None:
        return (layer + 1) % config.integer("interleave_moe_layer_step", 1) != 0
    if not isinstance(listed, list):
        raise config.wrong("moe_layers", "a list of layers")
    return layer not in listed


def _said(dense: Sequence[bool]) -> dict[str, object]:
    return {"moe_layers": [number for number, is_dense in enumerate(dense) if not is_dense]}


def _attends(config: Config, layer: int) -> dict[str, object]:
    """Layers with rotary positions see chunks, if there are any."""
    listed = bool(config.raw.get("no_rope_layers", True))  # an empty list is none
    own = config if listed else replace(config, raw={**config.raw, "no_rope_layers": None})
    rotary = rotates(own, layer, config.integer("num_hidden_layers"))
    chunked = rotary and config.raw.get("attention_chunk_size", 8192) is not None
    kind = "chunked_attention" if chunked else "full_attention"
    return {"no_rope_layers": rotary, "layer_types": kind}


def _refused(config: Config) -> str | None:
    if config.integer("num_experts_per_tok", 1) > 1:
        return (
            "num_experts_per_tok above 1 is not supported: each of a token's experts is given"
            " another input"
        )
    return None


FAMILY = Mixture(
    "Llama4ForCausalLM",
    keys=Keys(width="intermediate_size_mlp"),
    ffn=Part(_AT, {f"{_AT}.gate_proj": "1", f"{_AT}.up_proj": "1"}, f"{_AT}.down_proj"),
    groups=8,
    head_size=128,
    biased=biased_by(attention_bias="self_attn."),
    values_of_layer=_attends,
    check=_refused,
    experts=Experts(
        count=("num_local_experts",),
        width="intermediate_size",
        at=f"{_AT}.experts",
        router=(f"{_AT}.router.weight",),
        weighs_input=True,
        places=packed(
            f"{_AT}.experts",
            (f"{_AT}.experts.gate_up_proj", f"{_AT}.experts.down_proj"),
            transposed=True,
        ),
    ),
    shared=Shared(
        f"{_AT}.shared_expert", width=lambda config: config.integer("intermediate_size"), flat=True
    ),
    dense=Dense(_is_dense, _said),
)
