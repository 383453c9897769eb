"""Cohere (Command R): attention and FFN beside each other behind one norm."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, biased_by
from rayprune.workers.model.families.parts import ATTENTION


def _norms_of_heads(config: Config) -> Mapping[str, Any]:
    """Every head has weights of its own in the norms of queries and keys."""
    if not config.flag("use_qk_norm"):
        return {}
    norms = {"self_attn.q_norm.weight": ("n", "h"), "self_attn.k_norm.weight": ("1", "h")}
    return {"attention": replace(ATTENTION, follows=norms)}


FAMILY = Decoder(
    "CohereForCausalLM",
    norms=("input_layernorm",),
    biased=biased_by(attention_bias="self_attn."),
    tied=True,
    varies=_norms_of_heads,
)
