"""Gemma 3's text model: as Gemma 2, with a norm over each head; every sixth layer sees all."""

from rayprune.workers.model.families.decoder import Decoder, biased_by, divisors_only, slides_but
from rayprune.workers.model.families.parts import NORMS_AROUND

FAMILY = Decoder(
    "Gemma3ForCausalLM",
    norms=NORMS_AROUND,
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    biased=biased_by(attention_bias="self_attn."),
    scale=lambda config: None,
    fewer_heads=divisors_only,
    values_of_layer=slides_but(6),
    tied=True,
    groups=4,
    head_size=256,
)
