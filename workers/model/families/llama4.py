"""Llama 4 with its vision tower: the text model is pruned.

In transformers 5.24 the whole class fails on text (it asks the text model's output for pictures);
the text model in it predicts by itself.
"""

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.llama4_text import FAMILY as TEXT

FAMILY = Backbone(
    "Llama4ForConditionalGeneration",
    TEXT,
    "llama4_text",
    at="language_model.model",
    beside=("vision_model", "multi_modal_projector"),
    head="language_model.lm_head.weight",
    predictor="language_model",
    tied_by="text",
    older_names={},
)
