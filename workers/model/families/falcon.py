"""Falcon, its three kinds: KV groups interleaved (40B, 180B, 11B), one KV head (7B), or neither.

Its class takes the head size from the hidden size. With fewer heads, blocks side by side are
written as Phi, which computes the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.families.as_phi import Source, phi_form
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import WITH_BIAS, Heads, Keys, Part
from rayprune.workers.model.form import Form, Tensors

if TYPE_CHECKING:
    from torch import Tensor

_QKV = "self_attention.query_key_value"
_RENAMED = {"ffn_hidden_size": "intermediate_size", "layer_norm_epsilon": "layer_norm_eps"}
_NOT_PHI = (
    "activation",
    "alibi",
    "apply_residual_connection_post_layernorm",
    "bias",
    "hidden_dropout",
    "multi_query",
    "new_decoder_architecture",
    "num_kv_heads",
    "num_ln_in_parallel_attn",
    "parallel_attn",
)


def _grouped(config: Config) -> bool:
    return config.flag("new_decoder_architecture")


def _norms(config: Config) -> tuple[str, ...]:
    if not config.flag("parallel_attn", True):
        return ("input_layernorm", "post_attention_layernorm")
    norms = config.integer("num_ln_in_parallel_attn", 2 if _grouped(config) else 1)
    return ("ln_attn", "ln_mlp") if norms == 2 else ("input_layernorm",)


def _variant(config: Config) -> Mapping[str, Any]:
    parts = "h+h+h"
    if _grouped(config):
        parts = "q+h+h"
    elif config.flag("multi_query", True):
        parts = "q h h"
    found: dict[str, Any] = {"norms": _norms(config)}
    found["attention"] = replace(_ATTENTION, producers={_QKV: parts})
    if config.flag("alibi"):
        found["heads_stay"] = (
            "its positions (ALiBi) follow the number of heads, so all heads have to stay"
        )
    if not _grouped(config):
        found["keys"] = replace(_KEYS, kv_heads=None)
    return found


def _refused(config: Config) -> str | None:
    if _grouped(config) and not config.flag("parallel_attn", True):
        return "new_decoder_architecture without parallel_attn is not supported for falcon"
    if len(_norms(config)) == 2 and config.flag("parallel_attn", True) and not _grouped(config):
        return "num_ln_in_parallel_attn: 2 without new_decoder_architecture is not supported"
    return None


@dataclass(frozen=True)
class _Falcon(Decoder):
    def heads(self, config: Config) -> Heads:
        """Sizes of the attention: one KV head where `multi_query` says so."""
        found = super().heads(config)
        single = not _grouped(config) and config.flag("multi_query", True)
        return replace(found, groups=1) if single else found


def _as_phi(family: Decoder, config: Config, heads: int, target: str) -> Form:
    del target
    if not config.flag("parallel_attn", True):
        raise SpecError(
            f"falcon with sequential blocks cannot be written with {heads} heads: no stock class"
            " computes the same with a head size of its own; leave out budget.kv_groups"
        )
    sizes = family.heads(config)

    def split(rows: Tensors) -> "dict[str, Tensor]":
        apart = rows[_QKV].unflatten(0, (-1, sizes.each + 2, sizes.size))
        found = {"q": apart[:, :-2].flatten(0, 2)}
        return found | {"k": apart[:, -2].flatten(0, 1), "v": apart[:, -1].flatten(0, 1)}

    source = Source(
        norms=_norms(config),
        producers=(_QKV,),
        split=split,
        dense="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        outer={
            "transformer.word_embeddings": "model.embed_tokens",
            "transformer.ln_f": "model.final_layernorm",
            "lm_head": "lm_head",
        },
        each=sizes.each,
    )
    rotary = config.raw.get("rope_parameters")
    changes = {
        "hidden_act": config.raw.get("activation", "gelu"),
        "num_key_value_heads": heads // sizes.each,
        "head_dim": sizes.size,
        "partial_rotary_factor": 1.0,
        "layer_norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
    }
    if isinstance(rotary, dict):
        changes["rope_parameters"] = rotary | {"partial_rotary_factor": 1.0}
    return phi_form(source, changes, _NOT_PHI, _RENAMED)


_KEYS = Keys(kv_heads="num_kv_heads", head_dim=None, width="ffn_hidden_size")
_ATTENTION = Part("self_attention", {}, "self_attention.dense", returns=2)
FAMILY = _Falcon(
    "FalconForCausalLM",
    keys=_KEYS,
    attention=_ATTENTION,
    ffn=Part("mlp", {"mlp.dense_h_to_4h": "1"}, "mlp.dense_4h_to_h"),
    widths_of_hidden=4,
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("self_attention.", "mlp.") if config.flag("bias") else (),
    layer_returns=2,
    layers_at="transformer.h",
    backbone="transformer",
    embedding="transformer.word_embeddings.weight",
    last_norm="transformer.ln_f",
    tied=True,
    fewer_heads=_as_phi,
    pads=False,
    sized_alike="Falcon's layers cannot be built with sizes of their own yet",
    check=_refused,
    varies=_variant,
)
