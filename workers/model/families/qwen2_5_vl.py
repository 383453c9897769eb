"""Qwen2.5-VL: the text model is pruned, a Qwen2 whose positions have three axes. Published configs
are flat: transformers 5 saves them with a text_config.
"""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import QKV, Keys


def _slides_from(config: Config, layer: int) -> dict[str, object]:
    """From `max_window_layers` on layers have a sliding window, if windows are used."""
    most = config.raw.get("max_window_layers", 80)
    slides = config.flag("use_sliding_window") and isinstance(most, int) and layer >= most
    return {"layer_types": "sliding_attention" if slides else "full_attention"}


FAMILY = Backbone(
    "Qwen2_5_VLForConditionalGeneration",
    Decoder(
        "Qwen2_5_VLTextModel",
        groups=8,
        keys=Keys(head_dim=None),
        biased=lambda config: QKV,
        values_of_layer=_slides_from,
        heads_stay="its class takes the head size from hidden_size and num_attention_heads, so all"
        " heads have to stay",
    ),
    "qwen2_5_vl_text",
    beside=("model.visual",),
    tied_by="either",
    older_names={"visual.": "model.visual.", "model.": "model.language_model."},
)
