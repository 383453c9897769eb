"""What a `Decoder` is said in: keys of sizes, and the two parts of a layer.

Parts of a matrix's outputs are written as in `q h h`: the query rows of all units, then the rows of
one head (keys) of all units, then again (values); `h+h+h`: interleaved, those of one unit together;
`1`: one channel; `n`: as many as query heads in a unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from rayprune.workers.model.description import Axis, Consumer, Shapes

WEIGHT, WITH_BIAS = ("weight",), ("weight", "bias")
"""Tensors of a norm."""


@dataclass(frozen=True)
class Keys:
    """The config's keys of sizes; None: there is no such key."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    vocabulary: str = "vocab_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    width: str | None = "intermediate_size"
    positions: str = "max_position_embeddings"


KEYS = Keys()
"""Llama's."""
GPT_KEYS = Keys(
    hidden="n_embd",
    layers="n_layer",
    heads="n_head",
    kv_heads=None,
    head_dim=None,
    width="n_inner",
    positions="n_positions",
)
"""Those of GPT-2 and GPT-J."""


@dataclass(frozen=True)
class Part:
    """Attention or FFN: its block, the matrices whose outputs belong to the units, and its
    consumer.
    """

    block: str
    producers: Mapping[str, str]
    consumer: str
    returns: int = 0
    follows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further tensors: their axes, of which units lie along the first."""
    holds: tuple[str, ...] = ()
    """What names of its tensors begin with, where they are not those of the block."""
    flat: bool = False
    """Whether the block works on (B * T, D)."""


ATTENTION = Part(
    "self_attn",
    {"self_attn.q_proj": "q", "self_attn.k_proj": "h", "self_attn.v_proj": "h"},
    "self_attn.o_proj",
    returns=2,
)
FFN = Part("mlp", {"mlp.gate_proj": "1", "mlp.up_proj": "1"}, "mlp.down_proj")
PACKED_FFN = Part("mlp", {"mlp.gate_up_proj": "1 1"}, "mlp.down_proj")
"""Gate and up are one matrix."""
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NORMS_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
NORMS_AROUND = ("input_layernorm", "pre_feedforward_layernorm", *NORMS_BEHIND)


@dataclass(frozen=True)
class Heads:
    """Sizes of the attention: query heads, KV groups, and numbers of a head."""

    heads: int
    groups: int
    size: int

    @property
    def each(self) -> int:
        """Query heads of one KV group."""
        return self.heads // self.groups

    @property
    def queries(self) -> int:
        """Query rows of one KV group."""
        return self.each * self.size

    @property
    def sizes(self) -> dict[str, int]:
        """What the letters of parts stand for."""
        return {"q": self.queries, "h": self.size, "n": self.each, "1": 1}


def rows_of(parts: str, sizes: Mapping[str, int]) -> list[int]:
    """Rows of one unit in each of a matrix's blocks."""
    return [sum(sizes[term] for term in part.split("+")) for part in parts.split()]


def unit_parameters(shapes: Shapes, axes: Sequence[Axis], consumer: Consumer) -> int:
    """Parameters that go with one unit, counted from a layer's tensors; 0 where they are absent."""
    if consumer.weight not in shapes:
        return 0
    along = [*axes, Axis(consumer.weight, consumer.dim, consumer.columns)]
    return sum(a.per_unit * prod(shapes[a.tensor]) // shapes[a.tensor][a.dim] for a in along)
