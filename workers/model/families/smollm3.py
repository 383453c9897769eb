"""SmolLM3: every so many layers one without rotary positions; those may have a sliding window."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.values import rotates


def _skips_positions(config: Config, layer: int) -> dict[str, object]:
    rope = rotates(config, layer, config.integer("num_hidden_layers"))
    slides = config.flag("use_sliding_window") and config.optional("sliding_window") and not rope
    kind = "sliding_attention" if slides else "full_attention"
    return {"no_rope_layers": rope, "layer_types": kind}


FAMILY = Decoder(
    "SmolLM3ForCausalLM",
    groups=4,
    biased=biased_by(attention_bias="self_attn.", mlp_bias="mlp."),
    values_of_layer=_skips_positions,
    tied=True,
)
