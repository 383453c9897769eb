"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention, experts, an FFN beside them."""

from collections.abc import Mapping, Sequence

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.mixture import Dense, Experts, Mixture, Shared
from rayprune.workers.model.families.parts import QKV

_SHARED_WIDTH = "shared_expert_intermediate_size"


def _slides_below(config: Config, layer: int) -> dict[str, object]:
    """Below `max_window_layers` every other layer has a sliding window, if windows are used."""
    most = config.raw.get("max_window_layers", 28)
    below = isinstance(most, int) and layer < most and layer % 2 == 0
    slides = config.flag("use_sliding_window") and below
    return {"layer_types": "sliding_attention" if slides else "full_attention"}


def _is_dense(config: Config, layer: int) -> bool:
    only = config.raw.get("mlp_only_layers")
    if only is not None and not isinstance(only, list):
        raise config.wrong("mlp_only_layers", "a list of layers")
    return layer in (only or ()) or (layer + 1) % config.integer("decoder_sparse_step", 1) != 0


def _said(dense: Sequence[bool]) -> Mapping[str, object]:
    numbers = [number for number, is_dense in enumerate(dense) if is_dense]
    return {"mlp_only_layers": numbers, "decoder_sparse_step": 1}


DENSE = Dense(_is_dense, _said)
"""Those of a list, and those between every so many with experts."""

FAMILY = Mixture(
    "Qwen2MoeForCausalLM",
    groups=16,
    biased=lambda config: QKV if config.flag("qkv_bias", True) else (),
    values_of_layer=_slides_below,
    experts=Experts(count=("num_experts",)),
    dense=DENSE,
    shared=Shared(
        "mlp.shared_expert",
        width=lambda config: config.integer(_SHARED_WIDTH),
        key=_SHARED_WIDTH,
        first=True,
        flat=True,
        scale=None,
        beside={"mlp.shared_expert_gate.weight": lambda hidden: (1, hidden)},
    ),
)
