"""RoBERTa: BERT with positions that are counted from behind the padding token."""

from collections.abc import Mapping
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.encoder import Encoder


def _variant(config: Config) -> Mapping[str, Any]:
    token = config.raw.get("pad_token_id")
    return {"more_positions": 1 + (token if isinstance(token, int) else 1)}


ROBERTA = Encoder(
    "RobertaModel",
    backbone="roberta",
    head="lm_head.decoder.weight",
    predicting={
        "lm_head.bias": "V",
        "lm_head.dense.weight": "DD",
        "lm_head.dense.bias": "D",
        "lm_head.layer_norm.weight": "D",
        "lm_head.layer_norm.bias": "D",
    },
    tied_bias="lm_head.decoder.bias",
    varies=_variant,
)
FAMILY = ROBERTA
