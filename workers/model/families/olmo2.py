"""OLMo 2: norms behind the blocks, and over the queries and keys of all heads together."""

from dataclasses import replace

from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.parts import ATTENTION, NORMS_BEHIND

HEADS_STAY = (
    "its norms of queries and keys stretch over all heads, so all heads have to stay:"
    " without some the others would be normalised otherwise"
)
FAMILY = Decoder(
    "Olmo2ForCausalLM",
    attention=replace(
        ATTENTION, follows={"self_attn.q_norm.weight": ("q",), "self_attn.k_norm.weight": ("h",)}
    ),
    norms=NORMS_BEHIND,
    biased=biased_by(attention_bias="self_attn."),
    scale=lambda config: None,
    heads_stay=HEADS_STAY,
)
