"""XLM-RoBERTa: RoBERTa with more languages."""

from dataclasses import replace

from rayprune.workers.model.families.roberta import ROBERTA

FAMILY = replace(ROBERTA, architecture="XLMRobertaModel")
