"""Ministral 3."""

from rayprune.workers.model.families.decoder import Decoder

FAMILY = Decoder("Ministral3ForCausalLM", head_size=128)
