"""Ministral 3."""

from rayprune.workers.model.families.decoder import Decoder

FAMILY = Decoder("Ministral3ForCausalLM", groups=8, head_size=128)
