"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention, experts in every layer, an FFN beside them."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.mixture import Experts, Mixture, Shared
from rayprune.workers.model.families.parts import QKV

_SHARED_WIDTH = "shared_expert_intermediate_size"


def _slides_below(config: Config, layer: int) -> dict[str, object]:
    """Below `max_window_layers` every other layer has a sliding window, if windows are used."""
    most = config.raw.get("max_window_layers", 28)
    below = isinstance(most, int) and layer < most and layer % 2 == 0
    slides = config.flag("use_sliding_window") and below
    return {"layer_types": "sliding_attention" if slides else "full_attention"}


def all_sparse(config: Config) -> str | None:
    """Why a config is not supported: some of its layers have no experts."""
    if config.raw.get("mlp_only_layers") or config.integer("decoder_sparse_step", 1) != 1:
        return (
            "mlp_only_layers and decoder_sparse_step leave layers without experts: only models with"
            " experts in every layer are supported"
        )
    return None


FAMILY = Mixture(
    "Qwen2MoeForCausalLM",
    biased=lambda config: QKV if config.flag("qkv_bias", True) else (),
    values_of_layer=_slides_below,
    check=all_sparse,
    experts=Experts(count=("num_experts",)),
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
