"""Qwen2-MoE (Qwen1.5-MoE too): Qwen2's attention, experts in every layer, a gated FFN beside them."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.mixture import Experts, Mixture, Shared
from rayprune.workers.model.families.parts import QKV
from rayprune.workers.model.families.qwen2 import slides_above

_SHARED_WIDTH = "shared_expert_intermediate_size"


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
    values_of_layer=slides_above,
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
