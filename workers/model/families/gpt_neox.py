"""GPT-NeoX (Pythia): a head's queries, keys and values together, blocks side by side, two norms.

Its class takes the head size from the hidden size. With fewer heads it is written as Phi, which
computes the same: the norms' weights and biases are folded into the matrices behind them, queries,
keys and values come apart.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Shape
from rayprune.workers.model.families.decoder import Decoder, Keys, Part
from rayprune.workers.model.form import Form, Tensors

if TYPE_CHECKING:
    from torch import Tensor

_QKV, _UP = "attention.query_key_value", "mlp.dense_h_to_4h"
_MODULES = {"attention.dense": "self_attn.dense", "mlp.dense_4h_to_h": "mlp.fc2"}
_OUTER = {
    "gpt_neox.embed_in.weight": "model.embed_tokens.weight",
    "gpt_neox.final_layer_norm.weight": "model.final_layernorm.weight",
    "gpt_neox.final_layer_norm.bias": "model.final_layernorm.bias",
    "embed_out.weight": "lm_head.weight",
}
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
    changes: dict[str, object] = {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "hidden_act": config.raw.get("hidden_act", "gelu"),
        "num_key_value_heads": heads,
        "head_dim": size,
        "qk_layernorm": False,
    }
    if "rope_parameters" not in config.raw:
        changes["rope_theta"] = config.number("rotary_emb_base", 10000.0)
        changes["partial_rotary_factor"] = config.number("rotary_pct", 0.25)
    return Form(
        changes,
        dropped=_NOT_PHI,
        layers_at="model.layers",
        layer=partial(_phi_layer, size=size),
        outer=_phi_outer,
        layer_shapes=partial(_phi_shapes, size=size),
        outer_shapes=_phi_outer_shapes,
        modules=_MODULES,
    )


def _phi_layer(tensors: Tensors, size: int) -> "dict[str, Tensor]":
    qkv, qkv_bias = _folded(tensors, "input_layernorm", _QKV)
    up, up_bias = _folded(tensors, "post_attention_layernorm", _UP)
    norm = tensors["input_layernorm.weight"]
    result = {"input_layernorm.weight": norm.new_ones(len(norm))}
    result["input_layernorm.bias"] = norm.new_zeros(len(norm))
    for place, name in enumerate("qkv"):
        weight = qkv.unflatten(0, (-1, 3, size))[:, place].flatten(0, 1)
        bias = qkv_bias.unflatten(0, (-1, 3, size))[:, place].flatten()
        result |= {f"self_attn.{name}_proj.weight": weight, f"self_attn.{name}_proj.bias": bias}
    result |= {"mlp.fc1.weight": up, "mlp.fc1.bias": up_bias}
    for old, new in _MODULES.items():
        weight = tensors[f"{old}.weight"]
        bias = tensors.get(f"{old}.bias", weight.new_zeros(len(weight)))
        result |= {f"{new}.weight": weight, f"{new}.bias": bias}
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _folded(tensors: Tensors, norm: str, matrix: str) -> "tuple[Tensor, Tensor]":
    """A matrix and its bias behind a norm without weight and bias: W diag(g), b + W beta; fp64."""
    weight = tensors[f"{matrix}.weight"]
    wide = weight.double()
    gain, shift = (tensors[f"{norm}.{kind}"].double() for kind in ("weight", "bias"))
    given = tensors.get(f"{matrix}.bias")
    bias = wide @ shift if given is None else given.double() + wide @ shift
    return (wide * gain).to(weight.dtype), bias.to(weight.dtype)


def _phi_outer(tensors: Tensors) -> "dict[str, Tensor]":
    embedding = tensors["gpt_neox.embed_in.weight"]
    renamed = {_OUTER[name]: tensor for name, tensor in tensors.items()}
    return renamed | {"lm_head.bias": embedding.new_zeros(len(embedding))}


def _phi_shapes(shapes: Mapping[str, Shape], size: int) -> dict[str, Shape]:
    (rows, hidden), (width, _) = shapes[f"{_QKV}.weight"], shapes[f"{_UP}.weight"]
    queries = rows // 3 // size * size
    result: dict[str, Shape] = {f"input_layernorm.{kind}": (hidden,) for kind in ("weight", "bias")}
    matrices = {f"self_attn.{name}_proj": (queries, hidden) for name in "qkv"}
    matrices |= {"self_attn.dense": (hidden, queries)}
    matrices |= {"mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}
    for name, shape in matrices.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def _phi_outer_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    vocabulary = shapes["gpt_neox.embed_in.weight"][0]
    return {_OUTER[name]: shape for name, shape in shapes.items()} | {"lm_head.bias": (vocabulary,)}


def _biased(config: Config) -> tuple[str, ...]:
    return ("mlp.", "attention.") if config.flag("attention_bias", True) else ("mlp.",)


FAMILY = Decoder(
    "GPTNeoXForCausalLM",
    keys=Keys(kv_heads=None, head_dim=None),
    attention=Part("attention", {_QKV: "h+h+h"}, "attention.dense", returns=2),
    ffn=Part("mlp", {_UP: "1"}, "mlp.dense_4h_to_h"),
    norm_biases=True,
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
