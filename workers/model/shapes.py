"""Tensor shapes of every family from its config alone, and its layers as data for the plan. No
torch.

Names are those of the published files. Formulas work on `LayerKind` and `CoupledGroup`, never on a
family's name. Letters: D hidden, F width of a consumer's input, E experts, H head size.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rayprune.workers.model.families import (
    config_int,
    expected_shapes,
    family_of,
    ties_embeddings,
    unit_groups,
    unit_parameters,
)

Config = Mapping[str, object]
Shapes = dict[str, tuple[int, ...]]
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class CoupledGroup:
    """`count` alike blocks of a layer (one attention, or the experts), each with `num_units` units
    and a consumer of its own.

    A token passes through `active` of the blocks. A unit is `columns` columns of the consumer's
    input.
    """

    name: str
    count: int
    active: int
    num_units: int
    columns: int
    unit_parameters: int

    @property
    def width(self) -> int:
        """Input width F of one consumer."""
        return self.num_units * self.columns

    @property
    def parameters(self) -> int:
        """Parameters of all units of all blocks."""
        return self.count * self.num_units * self.unit_parameters


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers that have the same shapes."""

    first: int
    num_layers: int
    groups: tuple[CoupledGroup, ...]
    parameters: int
    num_bytes: int
    attention_width: int
    """Numbers a token's query meets per token it looks at: scores and values, over all heads."""
    matrix_sides: int = 0
    """Rows and columns of all its matrices: what low-rank adapters take for each rank."""

    @property
    def active_parameters(self) -> int:
        """Parameters of a layer that one token passes through."""
        idle = sum(
            (group.count - group.active) * group.num_units * group.unit_parameters
            for group in self.groups
        )
        return self.parameters - idle


@dataclass(frozen=True)
class _Form:
    """What differs between families that are built in another way."""

    layer_shapes: Callable[[Config, int], Shapes]
    groups: Callable[[Config, int, Shapes], tuple[CoupledGroup, ...]]
    attention_width: Callable[[Config], int]
    alike: Callable[[Config], list[range]]


def layer_shapes(config: Config, layer: int) -> Shapes:
    """Shapes of one decoder layer's tensors, by their names inside the layer.

    Raises:
        ModelError: the model type is not known, or the config lacks a size.
    """
    return _form(config).layer_shapes(config, layer)


def outer_shapes(config: Config) -> Shapes:
    """Shapes of the tensors outside the decoder layers, by their full names; a tied head is left
    out.
    """
    hidden = config_int(config, "hidden_size")
    embeddings = (config_int(config, "vocab_size"), hidden)
    head = {} if ties_embeddings(config) else {"lm_head.weight": embeddings}
    return {"model.embed_tokens.weight": embeddings, "model.norm.weight": (hidden,)} | head


def coupled_groups(config: Config, layer: int, shapes: Shapes) -> tuple[CoupledGroup, ...]:
    """The coupled groups of a layer with these tensors, in the order in which it computes them."""
    return _form(config).groups(config, layer, shapes)


def attention_width(config: Config) -> int:
    """See `LayerKind.attention_width`."""
    return _form(config).attention_width(config)


def alike_layers(config: Config) -> list[range]:
    """Layers with the same shapes, together."""
    return [layers for layers in _form(config).alike(config) if layers]


def _form(config: Config) -> _Form:
    return _FORMS.get(str(config.get("model_type")), _DENSE)


def _all_alike(config: Config) -> list[range]:
    return [range(config_int(config, "num_hidden_layers"))]


def _norms(config: Config, names: tuple[str, ...] = NORMS) -> Shapes:
    return {f"{name}.weight": (config_int(config, "hidden_size"),) for name in names}


def _dense_shapes(config: Config, layer: int) -> Shapes:
    del layer  # all are alike
    shapes: Shapes = {**expected_shapes(config)}
    family, head_size = family_of(config), unit_groups(config)[0].producers[1].rows
    prefixes = tuple(
        {"attention_bias": "self_attn.", "mlp_bias": "mlp."}[key]
        for key in family.bias_keys
        if config.get(key)
    )
    modules = [name.removesuffix(".weight") for name in shapes]
    biased = [
        name
        for name in modules
        if name in family.biased or (prefixes and name.startswith(prefixes))
    ]
    shapes |= {f"{name}.bias": (shapes[f"{name}.weight"][0],) for name in biased}
    return (
        shapes
        | _norms(config, family.norms)
        | {f"self_attn.{name}.weight": (head_size,) for name in family.head_norms}
    )


def _dense_groups(config: Config, layer: int, shapes: Shapes) -> tuple[CoupledGroup, ...]:
    del layer
    units = unit_groups(config)
    return tuple(
        CoupledGroup(unit.name, 1, 1, unit.num_units, unit.columns, unit_parameters(shapes, unit))
        for unit in units
    )


def _even_attention(config: Config) -> int:
    return 2 * config_int(config, "num_attention_heads") * _head_size(config)


def _head_size(config: Config) -> int:
    return config_int(
        config,
        "head_dim",
        config_int(config, "hidden_size") // config_int(config, "num_attention_heads"),
    )


def _mixtral_shapes(config: Config, layer: int) -> Shapes:
    del layer
    hidden, width, experts = (
        config_int(config, key) for key in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    heads, size = config_int(config, "num_attention_heads"), _head_size(config)
    kv = config_int(config, "num_key_value_heads", heads)
    shapes: Shapes = {
        f"self_attn.{name}_proj.weight": (rows * size, hidden)
        for name, rows in (("q", heads), ("k", kv), ("v", kv))
    }
    shapes |= {
        "self_attn.o_proj.weight": (hidden, heads * size),
        "block_sparse_moe.gate.weight": (experts, hidden),
    }
    for expert in range(experts):
        shapes |= _ffn(f"block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2"), hidden, width)
    return shapes | _norms(config)


def _mixtral_groups(config: Config, layer: int, shapes: Shapes) -> tuple[CoupledGroup, ...]:
    del layer, shapes
    hidden, heads, size = (
        config_int(config, "hidden_size"),
        config_int(config, "num_attention_heads"),
        _head_size(config),
    )
    kv = config_int(config, "num_key_value_heads", heads)
    queries = heads // kv * size
    experts, active = (
        config_int(config, "num_local_experts"),
        config_int(config, "num_experts_per_tok"),
    )
    return (
        CoupledGroup("heads", 1, 1, kv, queries, 2 * (queries + size) * hidden),
        CoupledGroup(
            "neurons", experts, active, config_int(config, "intermediate_size"), 1, 3 * hidden
        ),
    )


def _ffn(prefix: str, names: tuple[str, str, str], hidden: int, width: int) -> Shapes:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


def _is_moe(config: Config, layer: int) -> bool:
    return layer >= _num_dense(config) and layer % config_int(config, "moe_layer_freq", 1) == 0


def _num_dense(config: Config) -> int:
    value = config.get("first_k_dense_replace") or 0
    return min(
        config_int(config, "first_k_dense_replace") if value else 0,
        config_int(config, "num_hidden_layers"),
    )


def _latent_alike(config: Config) -> list[range]:
    layers, first, every = (
        config_int(config, "num_hidden_layers"),
        _num_dense(config),
        config_int(config, "moe_layer_freq", 1),
    )
    if every == 1:
        return [range(first), range(first, layers)]
    return [range(layer, layer + 1) for layer in range(layers)]


def _latent_sizes(config: Config) -> tuple[int, int, int, int]:
    """Heads, and per head the rows of queries, of keys and values out of the latent, and of values
    alone.
    """
    nope, rope, value = (
        config_int(config, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return config_int(config, "num_attention_heads"), nope + rope, nope + value, value


def _latent_shapes(config: Config, layer: int) -> Shapes:
    hidden, rank, rope = (
        config_int(config, key) for key in ("hidden_size", "kv_lora_rank", "qk_rope_head_dim")
    )
    heads, query, key_value, value = _latent_sizes(config)
    shapes: Shapes = {
        **_latent_queries(config, hidden, heads * query),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * key_value, rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }
    return shapes | _latent_mlp(config, layer, hidden) | _norms(config)


def _latent_queries(config: Config, hidden: int, rows: int) -> Shapes:
    if config.get("q_lora_rank") is None:
        return {"self_attn.q_proj.weight": (rows, hidden)}
    rank = config_int(config, "q_lora_rank")
    names = {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (rows, rank)}
    return {f"self_attn.{name}.weight": shape for name, shape in names.items()}


def _latent_mlp(config: Config, layer: int, hidden: int) -> Shapes:
    names = ("gate_proj", "up_proj", "down_proj")
    if not _is_moe(config, layer):
        return _ffn("mlp.", names, hidden, config_int(config, "intermediate_size"))
    experts, width = (
        config_int(config, "n_routed_experts"),
        config_int(config, "moe_intermediate_size"),
    )
    shapes: Shapes = {
        "mlp.gate.weight": (experts, hidden),
        "mlp.gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes |= _ffn(f"mlp.experts.{expert}.", names, hidden, width)
    return shapes | _ffn(
        "mlp.shared_experts.", names, hidden, width * config_int(config, "n_shared_experts", 1)
    )


def _latent_groups(config: Config, layer: int, shapes: Shapes) -> tuple[CoupledGroup, ...]:
    del shapes
    hidden, rank = config_int(config, "hidden_size"), config_int(config, "kv_lora_rank")
    heads, query, key_value, value = _latent_sizes(config)
    query_input = hidden if config.get("q_lora_rank") is None else config_int(config, "q_lora_rank")
    attention = CoupledGroup(
        "heads", 1, 1, heads, value, query * query_input + key_value * rank + value * hidden
    )
    if not _is_moe(config, layer):
        return attention, CoupledGroup(
            "neurons", 1, 1, config_int(config, "intermediate_size"), 1, 3 * hidden
        )
    experts, active, width = (
        config_int(config, key)
        for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    )
    shared = CoupledGroup(
        "shared", 1, 1, width * config_int(config, "n_shared_experts", 1), 1, 3 * hidden
    )
    return attention, CoupledGroup("experts", experts, active, width, 1, 3 * hidden), shared


def _latent_attention(config: Config) -> int:
    heads, query, _, value = _latent_sizes(config)
    return heads * (query + value)


def count_parameters(shapes: Shapes) -> int:
    """Number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


_DENSE = _Form(_dense_shapes, _dense_groups, _even_attention, _all_alike)
_FORMS: Mapping[str, _Form] = {
    "mixtral": _Form(_mixtral_shapes, _mixtral_groups, _even_attention, _all_alike),
    "deepseek_v3": _Form(_latent_shapes, _latent_groups, _latent_attention, _latent_alike),
}
