"""ELECTRA: BERT whose embeddings may have a size of their own."""

from collections.abc import Mapping
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.encoder import Encoder


def _variant(config: Config) -> Mapping[str, Any]:
    """Embeddings of another size are projected to the hidden size."""
    size = config.integer("embedding_size", 128)
    return {
        "embedded": size,
        "projection": "" if size == config.integer("hidden_size") else "embeddings_project",
    }


FAMILY = Encoder(
    "ElectraModel",
    backbone="electra",
    head="generator_lm_head.weight",
    predicting={
        "generator_lm_head.bias": "V",
        "generator_predictions.dense.weight": "ED",
        "generator_predictions.dense.bias": "E",
        "generator_predictions.LayerNorm.weight": "E",
        "generator_predictions.LayerNorm.bias": "E",
    },
    tied_bias="",
    varies=_variant,
)
