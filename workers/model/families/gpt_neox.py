"""GPT-NeoX (Pythia): a head's queries, keys and values together, blocks side by side, two norms.

Its class takes the head size from the hidden size. With fewer heads it is written as Phi.
"""

from typing import TYPE_CHECKING

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.families.as_phi import Source, phi_form
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import WITH_BIAS, Keys, Part
from rayprune.workers.model.form import Form, Tensors

if TYPE_CHECKING:
    from torch import Tensor

_QKV, _UP = "attention.query_key_value", "mlp.dense_h_to_4h"
_NOT_PHI = (
    "rotary_pct",
    "rotary_emb_base",
    "use_parallel_residual",
    "attention_bias",
    "classifier_dropout",
    "hidden_dropout",
)


def _as_phi(family: Decoder, config: Config, heads: int, target: str) -> Form:
    del target
    if not config.flag("use_parallel_residual", True):
        raise SpecError(
            f"gpt_neox with sequential blocks cannot be written with {heads} heads: no stock class"
            " computes the same with a head size of its own; leave out budget.kv_groups"
        )
    size = family.heads(config).size

    def split(rows: Tensors) -> "dict[str, Tensor]":
        apart = rows[_QKV].unflatten(0, (-1, 3, size))
        return {name: apart[:, place].flatten(0, 1) for place, name in enumerate("qkv")}

    source = Source(
        norms=("input_layernorm", "post_attention_layernorm"),
        producers=(_QKV,),
        split=split,
        dense="attention.dense",
        up=_UP,
        down="mlp.dense_4h_to_h",
        outer={
            "gpt_neox.embed_in": "model.embed_tokens",
            "gpt_neox.final_layer_norm": "model.final_layernorm",
            "embed_out": "lm_head",
        },
    )
    changes: dict[str, object] = {
        "hidden_act": config.raw.get("hidden_act", "gelu"),
        "num_key_value_heads": heads,
        "head_dim": size,
    }
    if "rope_parameters" not in config.raw:
        changes["rope_theta"] = config.number("rotary_emb_base", 10000.0)
        changes["partial_rotary_factor"] = config.number("rotary_pct", 0.25)
    return phi_form(source, changes, dropped=_NOT_PHI)


def _biased(config: Config) -> tuple[str, ...]:
    return ("mlp.", "attention.") if config.flag("attention_bias", True) else ("mlp.",)


FAMILY = Decoder(
    "GPTNeoXForCausalLM",
    keys=Keys(kv_heads=None, head_dim=None),
    attention=Part("attention", {_QKV: "h+h+h"}, "attention.dense", returns=2),
    ffn=Part("mlp", {_UP: "1"}, "mlp.dense_4h_to_h"),
    norm_tensors=WITH_BIAS,
    biased=_biased,
    layers_at="gpt_neox.layers",
    backbone="gpt_neox",
    embedding="gpt_neox.embed_in.weight",
    last_norm="gpt_neox.final_layer_norm",
    head="embed_out.weight",
    module_names={"embed_out.weight": "lm_head.weight"},
    pads=False,
    recomputed=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    fewer_heads=_as_phi,
    sized_alike="GPT-NeoX's layers cannot be built with sizes of their own yet",
)
