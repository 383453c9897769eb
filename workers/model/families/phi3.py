"""Phi-3: queries, keys and values in one matrix, gate and up in another."""

from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import PACKED_FFN, Part

FAMILY = Decoder(
    "Phi3ForCausalLM",
    attention=Part("self_attn", {"self_attn.qkv_proj": "q h h"}, "self_attn.o_proj", returns=2),
    ffn=PACKED_FFN,
)
