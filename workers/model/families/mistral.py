"""Mistral."""

from rayprune.workers.model.families.decoder import Decoder

FAMILY = Decoder("MistralForCausalLM", groups=8)
