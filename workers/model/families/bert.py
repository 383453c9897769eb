"""BERT: norms behind the blocks, biases everywhere."""

from rayprune.workers.model.families.encoder import Encoder

FAMILY = Encoder("BertModel", predicts=("ForMaskedLM", "ForPreTraining"))
