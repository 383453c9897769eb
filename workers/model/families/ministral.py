"""Ministral: Mistral whose layers say which of them have a sliding window."""

from rayprune.workers.model.families.decoder import Decoder

FAMILY = Decoder("MinistralForCausalLM", groups=8)
