"""Qwen3 (dense)."""

from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.qwen2 import slides_above

FAMILY = Decoder(
    "Qwen3ForCausalLM",
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    biased=biased_by(attention_bias="self_attn."),
    values_of_layer=slides_above,
    groups=32,
    head_size=128,
)
