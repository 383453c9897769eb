"""Hunyuan (dense): Llama's layers with a norm over each head, behind the rotary positions."""

from rayprune.workers.model.families.decoder import Decoder, biased_by

FAMILY = Decoder(
    "HunYuanDenseV1ForCausalLM",
    head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    biased=biased_by(attention_bias="self_attn."),
)
