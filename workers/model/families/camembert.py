"""CamemBERT: RoBERTa for French."""

from dataclasses import replace

from rayprune.workers.model.families.roberta import ROBERTA

FAMILY = replace(ROBERTA, architecture="CamembertModel")
