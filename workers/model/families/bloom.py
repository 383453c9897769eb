"""BLOOM: ALiBi instead of positions, a norm behind embeddings, residuals added inside blocks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import WITH_BIAS, Keys, Part


def _refused(config: Config) -> str | None:
    if config.flag("slow_but_exact") and config.integer("pretraining_tp", 1) > 1:
        return "slow_but_exact with pretraining_tp is not supported; set slow_but_exact: false"
    return None


def _variant(config: Config) -> Mapping[str, Any]:
    """Old configs, those of the published models, call the hidden size `n_embed`."""
    return {"keys": replace(_KEYS, hidden="n_embed")} if config.raw.get("n_embed") else {}


_KEYS = Keys(layers="n_layer", heads="n_head", kv_heads=None, head_dim=None, width=None)
FAMILY = Decoder(
    "BloomForCausalLM",
    keys=_KEYS,
    attention=Part(
        "self_attention.dense",
        {"self_attention.query_key_value": "h+h+h"},
        "self_attention.dense",
        holds=("self_attention.",),
    ),
    ffn=Part("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h": "1"}, "mlp.dense_4h_to_h", holds=("mlp.",)),
    widths_of_hidden=4,
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("self_attention.", "mlp."),
    scale=lambda config: None if config.flag("apply_residual_connection_post_layernorm") else 1.0,
    layer_returns=2,
    layers_at="transformer.h",
    backbone="transformer",
    embedding="transformer.word_embeddings.weight",
    outer_norms=("transformer.word_embeddings_layernorm",),
    last_norm="transformer.ln_f",
    tied=True,
    heads_stay="its positions (ALiBi) follow the number of heads, so all heads have to stay",
    width_stays="its class makes every FFN four times as wide as hidden_size, so all channels have"
    " to stay; whole layers can go: budget.drop_layers",
    pads=False,
    sized_alike="BLOOM's layers cannot be built with sizes of their own yet",
    check=_refused,
    varies=_variant,
)
