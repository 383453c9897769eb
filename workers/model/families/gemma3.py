"""Gemma 3 with its vision tower: the text model is pruned."""

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.gemma3_text import FAMILY as TEXT

FAMILY = Backbone(
    "Gemma3ForConditionalGeneration",
    TEXT,
    "gemma3_text",
    tied=True,
    missing={"vocab_size": 262208, "num_attention_heads": 8, "max_position_embeddings": 131072},
)
