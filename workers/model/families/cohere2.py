"""Cohere 2 (Command R7B, Command A): three layers with a sliding window, then one without."""

from rayprune.workers.model.families.decoder import Decoder, biased_by, slides_but

FAMILY = Decoder(
    "Cohere2ForCausalLM",
    norms=("input_layernorm",),
    biased=biased_by(attention_bias="self_attn."),
    values_of_layer=slides_but(4),
    tied=True,
)
