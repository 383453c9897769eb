"""Helium (Kyutai): Llama's layers with an output matrix as wide as the hidden size."""

from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import QKV

FAMILY = Decoder(
    "HeliumForCausalLM",
    biased=lambda config: (
        *(QKV if config.flag("attention_bias") else ()),
        *(("mlp.",) if config.flag("mlp_bias") else ()),
    ),
    heads_stay="its class makes the attention's output matrix as wide as hidden_size, so all heads"
    " have to stay",
    groups=20,
    head_size=128,
)
