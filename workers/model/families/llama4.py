"""Llama 4 with its vision tower: the text model is pruned, whose head sits inside it."""

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.llama4_text import FAMILY as TEXT

FAMILY = Backbone(
    "Llama4ForConditionalGeneration",
    TEXT,
    "llama4_text",
    at="language_model.model",
    head="language_model.lm_head.weight",
    beside=("vision_model", "multi_modal_projector"),
    older_names={},
)
