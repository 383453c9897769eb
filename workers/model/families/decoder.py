"""The usual decoder: attention and an FFN in every layer, alike in all. A family says what differs.

Parts of a matrix's outputs are written as in `q h h`: the query rows of all units, then the rows of
one head (keys) of all units, then again (values); `h+h+h`: interleaved, those of one unit together;
`1`: one channel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import (
    Axis,
    Block,
    Consumer,
    Group,
    Layer,
    Model,
    RemoteCode,
    Shape,
    Shapes,
)
from rayprune.workers.model.families.family import MOST_LAYERS, Family
from rayprune.workers.model.form import Form
from rayprune.workers.model.sized_layers import sized_layers
from rayprune.workers.model.values import check_layer_types, check_padding, check_values

ROTARY = (".rotary_emb.inv_freq",)
"""Buffers in old files."""


@dataclass(frozen=True)
class Keys:
    """The config's keys of sizes; None: there is no such key."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    vocabulary: str = "vocab_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    width: str = "intermediate_size"
    positions: str = "max_position_embeddings"


@dataclass(frozen=True)
class Part:
    """Attention or FFN: its block, the matrices whose outputs belong to the units, and its
    consumer.
    """

    block: str
    producers: Mapping[str, str]
    consumer: str
    returns: int = 0


ATTENTION = Part(
    "self_attn",
    {"self_attn.q_proj": "q", "self_attn.k_proj": "h", "self_attn.v_proj": "h"},
    "self_attn.o_proj",
    returns=2,
)
FFN = Part("mlp", {"mlp.gate_proj": "1", "mlp.up_proj": "1"}, "mlp.down_proj")


@dataclass(frozen=True)
class Heads:
    """Sizes of the attention: query heads, KV groups, and numbers of a head."""

    heads: int
    groups: int
    size: int

    @property
    def queries(self) -> int:
        """Query rows of one KV group."""
        return self.heads // self.groups * self.size


def any_number(family: "Decoder", config: Config, heads: int, target: str) -> Form:
    """Any number of heads loads: the class heeds `head_dim`."""
    del family, config, heads, target
    return Form()


def divisors_only(family: "Decoder", config: Config, heads: int, target: str) -> Form:
    """The config class wants the hidden size to be a multiple of the heads, even with `head_dim`.

    Raises:
        SpecError: it is none.
    """
    del target
    if family.hidden(config) % heads:
        raise SpecError(uneven(config, heads))
    return Form()


def uneven(config: Config, heads: int) -> str:
    """Why a config class refuses so many heads."""
    return (
        f"{config.model_type} cannot be written with {heads} heads: its config wants hidden_size to"
        " be a multiple of the heads; set budget.kv_groups"
    )


def biased_by(**keys: str) -> Callable[[Config], tuple[str, ...]]:
    """Modules that have biases where a key is set: key to the beginning of their names."""
    return lambda config: tuple(start for key, start in keys.items() if config.flag(key))


@dataclass(frozen=True)
class Decoder(Family):
    """A family of dense decoders; the defaults are Llama's names."""

    architecture: str
    keys: Keys = Keys()
    attention: Part = ATTENTION
    ffn: Part = FFN
    widths_of_hidden: int | None = None
    """FFN channels over the hidden size, where the config does not say."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms over the hidden size."""
    norm_biases: bool = False
    """Whether norms have biases, the last one too."""
    head_norms: tuple[str, ...] = ()
    """Norms over one head."""
    biased: Callable[[Config], Sequence[str]] = lambda config: ()
    """What names of matrices with biases begin with."""
    transposed: bool = False
    """Whether weights of the layers are (in, out)."""
    scale: Callable[[Config], float | None] = lambda config: 1.0
    """What a block's output is multiplied by where it is added to the stream; None: it is not
    added as it is."""
    layers_at: str = "model.layers"
    backbone: str = "model"
    embedding: str = "model.embed_tokens.weight"
    last_norm: str = "model.norm"
    head: str = "lm_head.weight"
    head_bias: str | None = None
    """Name of the head's bias, where it has one."""
    position_table: str | None = None
    """Name of the matrix of learned positions, where there is one."""
    tied: bool = False
    """Whether the head is the embedding matrix where the config does not say."""
    pads: bool = True
    """Whether the class keeps a row of the embeddings for the padding token."""
    module_names: Mapping[str, str] = field(default_factory=dict)
    recomputed: tuple[str, ...] = ROTARY
    fewer_heads: Callable[["Decoder", Config, int, str], Form] = any_number
    """How a model with so many heads is written, beside the keys of its sizes."""
    heads_stay: str | None = None
    """Why no heads can be removed."""
    values_of_layer: Callable[[Config, int], dict[str, object]] = lambda config, layer: {}
    sized_alike: str | None = None
    """Why layers must keep the same numbers of units."""
    check: Callable[[Config], str | None] = lambda config: None
    """Why a config of this type is not supported."""

    def hidden(self, config: Config) -> int:
        """The hidden size."""
        return config.integer(self.keys.hidden)

    def heads(self, config: Config) -> Heads:
        """Sizes of the attention.

        Raises:
            ModelError: heads do not form whole KV groups.
        """
        keys = self.keys
        heads = config.integer(keys.heads)
        groups = config.integer(keys.kv_heads, heads) if keys.kv_heads else heads
        default = self.hidden(config) // heads
        size = config.integer(keys.head_dim, default) if keys.head_dim else default
        if heads % groups:
            raise ModelError(
                f"{config.file}: {keys.heads} ({heads}) is no multiple of {keys.kv_heads}"
                f" ({groups})"
            )
        return Heads(heads, groups, size)

    def width(self, config: Config) -> int:
        """FFN channels."""
        times = self.widths_of_hidden
        return config.integer(self.keys.width, times and times * self.hidden(config))

    def count_layers(self, config: Config) -> int:
        """How many layers a config says."""
        return config.integer(self.keys.layers, most=MOST_LAYERS)

    def of_count(self, num_layers: int) -> dict[str, object]:
        """The keys that say so many layers."""
        return {self.keys.layers: num_layers}

    def describe(self, config: Config) -> Model:
        """The model that a config says."""
        if problem := self.check(config):
            raise ModelError(f"{config.file}: {problem}")
        check_values(config)
        check_layer_types(config, self.count_layers(config))
        count = self.count_layers(config)
        layers = (self._layer(config),) * count
        if config.layers_differ:
            layers = tuple(self._layer(config.of_layer(layer)) for layer in range(count))
        hidden, vocabulary = self.hidden(config), config.integer(self.keys.vocabulary)
        tied = config.flag("tie_word_embeddings", self.tied)
        if self.pads:
            check_padding(config, vocabulary)
        return Model(
            model_type=config.model_type,
            auto_class="AutoModelForCausalLM",
            layers=layers,
            layers_at=self.layers_at,
            backbone=self.backbone,
            last_norm=self.last_norm,
            hidden=hidden,
            vocabulary=vocabulary,
            outer=self._outer(config, hidden, vocabulary, tied),
            embedding=self.embedding,
            head=self.head,
            tied=tied,
            dtype=config.dtype,
            positions=config.optional(self.keys.positions),
            position_table=self.position_table,
            module_names=self.module_names,
            recomputed=self.recomputed,
            sized_alike=self.sized_alike,
            layers_differ=config.layers_differ,
            code=self.code() if config.layers_differ else None,
            caches=self._caches(config, count),
        )

    def code(self) -> RemoteCode:
        """The class that builds models whose layers differ in size."""
        return sized_layers(self.architecture)

    def _caches(self, config: Config, count: int) -> tuple[str, ...]:
        given = config.raw.get("layer_types")
        if isinstance(given, list) and len(given) == count:
            return tuple(map(str, given))
        found = [self.layer_values(config, layer).get("layer_types", "") for layer in range(count)]
        return tuple(map(str, found)) if len(set(found)) > 1 else ()

    def _outer(self, config: Config, hidden: int, vocabulary: int, tied: bool) -> Shapes:
        shapes: dict[str, Shape] = {self.embedding: (vocabulary, hidden)}
        shapes |= self._norm(self.last_norm, hidden)
        if self.position_table:
            shapes[self.position_table] = (config.integer(self.keys.positions), hidden)
        shapes |= {} if tied else {self.head: (vocabulary, hidden)}
        return shapes | ({self.head_bias: (vocabulary,)} if self.head_bias else {})

    def _norm(self, name: str, size: int) -> dict[str, Shape]:
        kinds = ("weight", "bias") if self.norm_biases else ("weight",)
        return {f"{name}.{kind}": (size,) for kind in kinds}

    def _layer(self, config: Config) -> Layer:
        heads, hidden, skipped = self.heads(config), self.hidden(config), config.skipped
        sizes = {"q": heads.queries, "h": heads.size, "1": 1}
        shapes: dict[str, Shape] = {}
        for norm in self.norms:
            shapes |= self._norm(norm, hidden)
        parts = [
            ("heads", "KV groups", self.attention, heads.groups, heads.queries),
            ("neurons", "FFN channels", self.ffn, self.width(config), 1),
        ]
        absent = {"heads": "attention" in skipped, "neurons": "mlp" in skipped}
        for name, _, part, units, columns in parts:
            if not absent[name]:
                shapes |= self._matrices(config, part, units, columns, sizes, hidden)
        if not absent["heads"]:
            shapes |= {f"{norm}.weight": (heads.size,) for norm in self.head_norms}
        groups = []
        for name, title, part, units, columns in parts:
            axes = self._axes(part, 0 if absent[name] else units, sizes, shapes)
            consumer = Consumer(part.consumer, columns, self.transposed)
            groups.append(
                Group(
                    name=name,
                    kind="attention" if name == "heads" else "ffn",
                    title=title,
                    num_units=0 if absent[name] else units,
                    axes=axes,
                    consumer=consumer,
                    block=Block(part.block, part.returns, self.scale(config)),
                    unit_parameters=unit_parameters(shapes, axes, consumer),
                    cached=2 * heads.size if name == "heads" else 0,
                    fixed=self.heads_stay if name == "heads" else None,
                )
            )
        return Layer(tuple(groups), shapes, 2 * heads.heads * heads.size)

    def _matrices(
        self,
        config: Config,
        part: Part,
        units: int,
        columns: int,
        sizes: Mapping[str, int],
        hidden: int,
    ) -> dict[str, Shape]:
        outs = {name: units * sum(_rows(parts, sizes)) for name, parts in part.producers.items()}
        shapes = {f"{name}.weight": (out, hidden) for name, out in outs.items()}
        shapes[f"{part.consumer}.weight"] = (hidden, units * columns)
        biased = tuple(self.biased(config))
        for name, out in (outs | {part.consumer: hidden}).items():
            if biased and name.startswith(biased):
                shapes[f"{name}.bias"] = (out,)  # type: ignore[assignment]
        return {name: s[::-1] if self.transposed else s for name, s in shapes.items()}

    def _axes(
        self, part: Part, units: int, sizes: Mapping[str, int], shapes: Shapes
    ) -> tuple[Axis, ...]:
        axes = []
        for name, parts in part.producers.items():
            start = 0
            for rows in _rows(parts, sizes):
                for tensor, dim in ((f"{name}.weight", int(self.transposed)), (f"{name}.bias", 0)):
                    if tensor in shapes:
                        axes.append(Axis(tensor, dim, rows, start))
                start += rows * units
        return tuple(axes)

    def layer_values(self, config: Config, layer: int) -> dict[str, object]:
        """What the config class works out from a layer's number."""
        return self.values_of_layer(config, layer)

    def layer_sizes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        """What the config of one layer says of its sizes; `skip` names absent blocks."""
        heads, keys, sizes = self.heads(config), self.keys, dict[str, object]()
        if kept["heads"]:
            sizes[keys.heads] = heads.heads // heads.groups * kept["heads"]
            sizes |= {keys.kv_heads: kept["heads"]} if keys.kv_heads else {}
        if kept["neurons"]:
            sizes[keys.width] = kept["neurons"]
        blocks = {"heads": "attention", "neurons": "mlp"}
        skipped = [block for name, block in blocks.items() if not kept[name]]
        return sizes | ({"skip": skipped} if skipped else {})

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """The family's own form with smaller sizes, or what `fewer_heads` says."""
        heads, keys = self.heads(config), self.keys
        stay = heads.heads // heads.groups * kept["heads"]
        changes: dict[str, object] = {keys.heads: stay}
        changes |= {keys.kv_heads: kept["heads"]} if keys.kv_heads else {}
        changes |= {keys.head_dim: heads.size} if keys.head_dim else {}
        changes[keys.width] = kept["neurons"]
        if kept["heads"] == heads.groups:
            return Form(changes)
        if self.heads_stay:
            raise SpecError(f"{config.model_type}: {self.heads_stay}")
        found = self.fewer_heads(self, config, stay, target)
        return Form(**{**vars(found), "changes": changes | dict(found.changes)})


def unit_parameters(shapes: Shapes, axes: Sequence[Axis], consumer: Consumer) -> int:
    """Parameters that go with one unit, counted from a layer's tensors; 0 where they are absent."""
    if consumer.weight not in shapes:
        return 0
    along = [*axes, Axis(consumer.weight, consumer.dim, consumer.columns)]
    return sum(a.per_unit * prod(shapes[a.tensor]) // shapes[a.tensor][a.dim] for a in along)


def _rows(parts: str, sizes: Mapping[str, int]) -> list[int]:
    """Rows of one unit in each of a matrix's blocks."""
    return [sum(sizes[term] for term in part.split("+")) for part in parts.split()]
