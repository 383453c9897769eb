"""Qwen3-VL: the text model is pruned, a Qwen3 whose positions have three axes."""

from dataclasses import replace

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.qwen3 import FAMILY as TEXT

FAMILY = Backbone(
    "Qwen3VLForConditionalGeneration",
    replace(TEXT, values_of_layer=lambda config, layer: {}),
    "qwen3_vl_text",
    beside=("model.visual",),
    older_names={},
)
