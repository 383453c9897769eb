"""Gemma."""

from rayprune.workers.model.families.decoder import Decoder, biased_by

FAMILY = Decoder(
    "GemmaForCausalLM",
    biased=biased_by(attention_bias="self_attn."),
    tied=True,
    groups=16,
    head_size=256,
)
