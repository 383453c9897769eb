"""Granite (IBM): Llama's layers, whose blocks are added to the stream times a multiplier."""

from rayprune.workers.model.families.decoder import Decoder, biased_by

FAMILY = Decoder(
    "GraniteForCausalLM",
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
    scale=lambda config: config.number("residual_multiplier", 1.0),
)
