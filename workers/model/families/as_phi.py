"""Writing a model as Phi, which takes any number of heads: blocks side by side behind one norm.

The queries', keys' and values' matrices come apart; where a model has a norm before each block,
their weights and biases are folded into the matrices behind them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rayprune.workers.model.description import Shape
from rayprune.workers.model.form import Form, Tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Where a layer has what Phi needs. Names are those of modules."""

    norms: tuple[str, ...]
    """The norm before both blocks, or that of the attention and that of the FFN."""
    producers: tuple[str, ...]
    """The matrices of queries, keys and values."""
    split: "Callable[[Tensors], dict[str, Tensor]]"
    """Rows of `q`, `k` and `v`, out of those of the producers: of weights and of biases."""
    dense: str
    up: str
    down: str
    outer: Mapping[str, str]
    """Modules outside the layers: theirs to Phi's."""
    each: int = 1
    """Query heads of one KV group."""


def phi_form(
    source: Source,
    changes: Mapping[str, object],
    dropped: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Form:
    """The form: `changes` say what its config has beside sizes."""
    phi = {"model_type": "phi", "architectures": ["PhiForCausalLM"], "qk_layernorm": False}
    return Form(
        phi | dict(changes),
        dropped=dropped,
        renamed=renamed or {},
        layers_at="model.layers",
        layer=partial(_layer, source),
        outer=partial(_outer, source),
        layer_shapes=partial(_layer_shapes, source),
        outer_shapes=partial(_outer_shapes, source),
        modules={source.dense: "self_attn.dense", source.down: "mlp.fc2"},
    )


def _layer(source: Source, tensors: Tensors) -> "dict[str, Tensor]":
    first, last = source.norms[0], source.norms[-1]
    gain, shift = (tensors[f"{first}.{kind}"] for kind in ("weight", "bias"))
    result = {"input_layernorm.weight": gain, "input_layernorm.bias": shift}
    read: Callable[[Tensors, str, str], tuple[Tensor, Tensor]] = _matrix
    if first != last:
        result = {
            "input_layernorm.weight": gain.new_ones(len(gain)),
            "input_layernorm.bias": shift.new_zeros(len(shift)),
        }
        read = _folded
    apart = {name: read(tensors, name, first) for name in source.producers}
    for place, kind in enumerate(("weight", "bias")):
        rows = source.split({name: matrix[place] for name, matrix in apart.items()})
        result |= {f"self_attn.{name}_proj.{kind}": tensor for name, tensor in rows.items()}
    matrices = {"mlp.fc1": read(tensors, source.up, last)}
    matrices["self_attn.dense"] = _matrix(tensors, source.dense)
    matrices["mlp.fc2"] = _matrix(tensors, source.down)
    for name, (weight, bias) in matrices.items():
        result |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _matrix(tensors: Tensors, name: str, norm: str = "") -> "tuple[Tensor, Tensor]":
    """A matrix and its bias, zeros where it has none."""
    del norm
    weight = tensors[f"{name}.weight"]
    return weight, tensors.get(f"{name}.bias", weight.new_zeros(len(weight)))


def _folded(tensors: Tensors, name: str, norm: str) -> "tuple[Tensor, Tensor]":
    """A matrix and its bias behind a norm without weight and bias: W diag(g), b + W beta; fp64."""
    weight, bias = _matrix(tensors, name)
    wide = weight.double()
    gain, shift = (tensors[f"{norm}.{kind}"].double() for kind in ("weight", "bias"))
    return (wide * gain).to(weight.dtype), (bias.double() + wide @ shift).to(weight.dtype)


def _outer(source: Source, tensors: Tensors) -> "dict[str, Tensor]":
    renamed = {_renamed(source, name): tensor for name, tensor in tensors.items()}
    embedding = renamed["model.embed_tokens.weight"]
    return {"lm_head.bias": embedding.new_zeros(len(embedding))} | renamed


def _renamed(source: Source, name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{source.outer[module]}.{kind}"


def _layer_shapes(source: Source, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    (hidden, queries), (width, _) = (shapes[f"{n}.weight"] for n in (source.dense, source.up))
    result: dict[str, Shape] = {f"input_layernorm.{kind}": (hidden,) for kind in ("weight", "bias")}
    rows = {"q": queries, "k": queries // source.each, "v": queries // source.each}
    matrices = {f"self_attn.{name}_proj": (count, hidden) for name, count in rows.items()}
    matrices |= {"self_attn.dense": (hidden, queries)}
    matrices |= {"mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}
    for name, shape in matrices.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def _outer_shapes(source: Source, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    renamed = {_renamed(source, name): shape for name, shape in shapes.items()}
    return {"lm_head.bias": renamed["model.embed_tokens.weight"][:1]} | renamed
