"""OLMoE: experts, and norms over the queries and keys of all heads together."""

from dataclasses import replace

from rayprune.workers.model.families.decoder import biased_by
from rayprune.workers.model.families.mixture import Experts, Mixture
from rayprune.workers.model.families.olmo2 import HEADS_STAY
from rayprune.workers.model.families.parts import ATTENTION

FAMILY = Mixture(
    "OlmoeForCausalLM",
    attention=replace(
        ATTENTION, follows={"self_attn.q_norm.weight": ("q",), "self_attn.k_norm.weight": ("h",)}
    ),
    biased=biased_by(attention_bias="self_attn."),
    heads_stay=HEADS_STAY,
    experts=Experts(count=("num_experts", "num_local_experts"), width="intermediate_size"),
)
