"""Mistral Small 3.1 and its kin with their vision tower: the text model, a Mistral, is pruned."""

from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.mistral import FAMILY as TEXT

FAMILY = Backbone("Mistral3ForConditionalGeneration", TEXT, "mistral", tied=True)
