"""ERNIE 4.5 (dense): Llama's layers with interleaved rotary positions."""

from rayprune.workers.model.families.decoder import Decoder, biased_by

FAMILY = Decoder(
    "Ernie4_5ForCausalLM", biased=biased_by(use_bias=""), tied=True, groups=2, head_size=128
)
