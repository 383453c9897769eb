"""SmolLM3: every so many layers one without rotary positions; those may have a sliding window."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, biased_by


def _skips_positions(config: Config, layer: int) -> dict[str, object]:
    given = config.raw.get("no_rope_layers")
    every = config.integer("no_rope_layer_interval", 4)
    rope = given[layer] if isinstance(given, list) else int((layer + 1) % every != 0)
    slides = config.flag("use_sliding_window") and config.optional("sliding_window") and not rope
    kind = "sliding_attention" if slides else "full_attention"
    return {"no_rope_layers": rope, "layer_types": kind}


FAMILY = Decoder(
    "SmolLM3ForCausalLM",
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
    values_of_layer=_skips_positions,
    tied=True,
)
