"""Qwen3-MoE: Qwen3's attention, experts in most layers."""

from rayprune.workers.model.families.decoder import biased_by
from rayprune.workers.model.families.mixture import Mixture
from rayprune.workers.model.families.qwen2_moe import DENSE

FAMILY = Mixture(
    "Qwen3MoeForCausalLM",
    groups=4,
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    biased=biased_by(attention_bias="self_attn."),
    dense=DENSE,
)
