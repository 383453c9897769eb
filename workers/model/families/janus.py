"""Janus, which sees pictures as features and writes them as tokens of a head of their own: its text
model, a Llama, is pruned.
"""

from dataclasses import replace

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.decoder import divisors_only
from rayprune.workers.model.families.llama import FAMILY as TEXT

FAMILY = Backbone(
    "JanusForConditionalGeneration",
    replace(TEXT, fewer_heads=divisors_only),  # a Llama alone is read as its text model
    "llama",
    beside=tuple(
        f"model.{module}"
        for module in (
            "vision_model",
            "aligner",
            "vqmodel",
            "generation_embeddings",
            "generation_aligner",
            "generation_head",
        )
    ),
    tied=True,
    older_names={},
)
