"""DistilBERT: BERT without kinds of tokens and without a pooler, with names of its own."""

from rayprune.workers.model.families.encoder import Encoder
from rayprune.workers.model.families.parts import Keys, Part

FAMILY = Encoder(
    "DistilBertModel",
    keys=Keys(
        hidden="dim",
        layers="n_layers",
        heads="n_heads",
        kv_heads=None,
        head_dim=None,
        width="hidden_dim",
    ),
    attention=Part(
        "attention",
        {"attention.q_lin": "h", "attention.k_lin": "h", "attention.v_lin": "h"},
        "attention.out_lin",
        returns=2,
    ),
    ffn=Part("ffn", {"ffn.lin1": "1"}, "ffn.lin2"),
    norms=("sa_layer_norm", "output_layer_norm"),
    layers_at="transformer.layer",
    backbone="distilbert",
    token_types="",
    head="vocab_projector.weight",
    predicting={
        "vocab_projector.bias": "V",
        "vocab_transform.weight": "DD",
        "vocab_transform.bias": "D",
        "vocab_layer_norm.weight": "D",
        "vocab_layer_norm.bias": "D",
    },
    tied_bias="",
)
