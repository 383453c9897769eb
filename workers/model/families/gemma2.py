"""Gemma 2: norms before and behind every block, so that no block's output is added as it is."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, biased_by, divisors_only
from rayprune.workers.model.families.parts import NORMS_AROUND


def _alternate(config: Config, layer: int) -> dict[str, object]:
    """Every other layer has a sliding window."""
    del config
    return {"layer_types": "full_attention" if layer % 2 else "sliding_attention"}


FAMILY = Decoder(
    "Gemma2ForCausalLM",
    norms=NORMS_AROUND,
    biased=biased_by(attention_bias="self_attn."),
    scale=lambda config: None,
    fewer_heads=divisors_only,
    values_of_layer=_alternate,
    tied=True,
    groups=4,
    head_size=256,
)
