"""The usual decoder: attention and an FFN in every layer, alike in all. What differs is data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from rayprune.workers.model.families.parts import (
    ATTENTION,
    FFN,
    KEYS,
    WEIGHT,
    Heads,
    Keys,
    Part,
    rows_of,
    unit_parameters,
)
from rayprune.workers.model.form import Form
from rayprune.workers.model.sized_layers import sized_layers
from rayprune.workers.model.values import (
    check_causal,
    check_layer_types,
    check_padding,
    check_values,
)

ROTARY = (".rotary_emb.inv_freq",)
"""Buffers in old files."""


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


def slides_but(
    every: int, key: str | None = "sliding_window_pattern"
) -> Callable[[Config, int], dict[str, object]]:
    """Layers with a sliding window, but for one in so many, or as many as a key says."""

    def _kind(config: Config, layer: int) -> dict[str, object]:
        given = config.raw.get(key) if key else None
        if isinstance(given, str):
            slides = given[layer % len(given)] == "L"
        else:
            slides = (layer + 1) % (config.integer(key, every) if key else every) != 0
        return {"layer_types": "sliding_attention" if slides else "full_attention"}

    return _kind


def _or_default(config: Config, key: str | None, default: int | None, worked_out: int) -> int:
    """A size; a key that is left out is the class's default, and null is worked out, as the classes
    of transformers do.
    """
    default = default or worked_out
    if key is None:
        return default
    return config.integer(key, worked_out if key in config.raw else default)


@dataclass(frozen=True)
class Decoder(Family):
    """A family of dense decoders; the defaults are Llama's names."""

    architecture: str
    keys: Keys = KEYS
    attention: Part = ATTENTION
    ffn: Part = FFN
    groups: int | None = None
    """KV groups where the config does not say; None: one for each head."""
    head_size: int | None = None
    """Numbers of a head where the config does not say; None: the hidden size over the heads."""
    widths_of_hidden: int | None = None
    """FFN channels over the hidden size, where the config does not say."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms over the hidden size."""
    norm_tensors: tuple[str, ...] = WEIGHT
    """Tensors of a norm, of the last one too."""
    head_norms: tuple[str, ...] = ()
    """Norms over one head."""
    biased: Callable[[Config], Sequence[str]] = lambda config: ()
    """What names of matrices with biases begin with."""
    transposed: bool = False
    """Whether weights of the layers are (in, out)."""
    scale: Callable[[Config], float | None] = lambda config: 1.0
    """What a block's output is multiplied by where it is added to the stream; None: it is not
    added as it is."""
    layer_returns: int = 0
    """Length of the tuple that a layer returns; 0: it returns the hidden states."""
    layers_at: str = "model.layers"
    backbone: str = "model"
    embedding: str = "model.embed_tokens.weight"
    last_norm: str = "model.norm"
    outer_norms: tuple[str, ...] = ()
    """Norms outside the layers, beside the last one."""
    head: str = "lm_head.weight"
    head_bias: str | None = None
    """Name of the head's bias, where it has one."""
    position_table: str | None = None
    """Name of the matrix of learned positions, where there is one."""
    more_positions: int = 0
    """Rows of it that no position reads."""
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
    width_stays: str | None = None
    """Why no FFN channels can be removed."""
    values_of_layer: Callable[[Config, int], dict[str, object]] = lambda config, layer: {}
    sized_alike: str | None = None
    """Why layers must keep the same numbers of units."""
    first_stays: str | None = None
    """Why the first layer has to stay."""
    last_stays: str | None = None
    """Why the last layer has to stay."""
    hands_on: bool = False
    """Whether the first layer returns what the others are given."""
    check: Callable[[Config], str | None] = lambda config: None
    """Why a config of this type is not supported."""
    varies: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    """Fields of this that are otherwise with a config."""

    def of(self, config: Config) -> "Decoder":
        """The family as it is with a config."""
        return replace(self, **self.varies(config))

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
        groups = _or_default(config, keys.kv_heads, self.groups, heads)
        size = _or_default(config, keys.head_dim, self.head_size, self.hidden(config) // heads)
        if heads % groups:
            raise ModelError(
                f"{config.file}: {keys.heads} ({heads}) is no multiple of {keys.kv_heads}"
                f" ({groups})"
            )
        return Heads(heads, groups, size)

    def width(self, config: Config) -> int:
        """FFN channels."""
        times = self.widths_of_hidden
        default = times and times * self.hidden(config)
        if self.keys.width:
            return config.integer(self.keys.width, default)
        assert default is not None
        return default

    def count_layers(self, config: Config) -> int:
        """How many layers a config says."""
        return config.integer(self.keys.layers, most=MOST_LAYERS)

    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The keys that say that these layers stay."""
        del config
        return {self.keys.layers: len(layers)}

    def describe(self, config: Config) -> Model:
        """The model that a config says."""
        if problem := self.check(config):
            raise ModelError(f"{config.file}: {problem}")
        self.check_class(config)
        check_values(config)
        check_layer_types(config, self.count_layers(config))
        count = self.count_layers(config)
        hidden, vocabulary = self.hidden(config), config.integer(self.keys.vocabulary)
        tied = config.flag("tie_word_embeddings", self.tied)
        if self.pads:
            check_padding(config, vocabulary)
        return Model(
            model_type=config.model_type,
            auto_class="AutoModelForCausalLM",
            layers=self._layers(config),
            layers_at=self.layers_at,
            layer_returns=self.layer_returns,
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
            first_stays=self.first_stays,
            last_stays=self.last_stays,
            hands_on=self.hands_on,
            layers_differ=config.layers_differ,
            code=self.code(config) if config.layers_differ else None,
            caches=self._caches(config, count),
        )

    def _layers(self, config: Config) -> tuple[Layer, ...]:
        """Every layer; alike ones are one object."""
        count = self.count_layers(config)
        if config.layers_differ:
            return tuple(self._layer(self.of_layer(config, layer)) for layer in range(count))
        return (self._layer(config),) * count

    def check_class(self, config: Config) -> None:
        """Refuse a config that names a class which is not pruned.

        Raises:
            ModelError: it does.
        """
        check_causal(config)

    def of_layer(self, config: Config, layer: int) -> Config:
        """The config of one layer of a model whose layers differ in size."""
        return config.of_layer(layer)

    def code(self, config: Config) -> RemoteCode:
        """The class that builds models whose layers differ in size."""
        del config
        return sized_layers(self.architecture)

    def sized(self, config: Config, layers: Sequence[Mapping[str, int]]) -> dict[str, object]:
        """The keys from which that class takes the units of every layer."""
        units = self.describe(config).units
        sizes = {
            index: self.layer_sizes(config, kept)
            for index, kept in enumerate(layers)
            if kept != units
        }
        return {"per_layer_config": sizes, "allow_global_per_layer_attribute_access": True}

    def _caches(self, config: Config, count: int) -> tuple[str, ...]:
        given = config.raw.get("layer_types")
        if isinstance(given, list) and len(given) == count:
            return tuple(map(str, given))
        found = [self.layer_values(config, layer).get("layer_types", "") for layer in range(count)]
        return tuple(map(str, found)) if len(set(found)) > 1 else ()

    def _outer(self, config: Config, hidden: int, vocabulary: int, tied: bool) -> Shapes:
        shapes: dict[str, Shape] = {self.embedding: (vocabulary, hidden)}
        for norm in (self.last_norm, *self.outer_norms):
            shapes |= self._norm(norm, hidden)
        if self.position_table:
            positions = config.integer(self.keys.positions) + self.more_positions
            shapes[self.position_table] = (positions, hidden)
        shapes |= {} if tied else {self.head: (vocabulary, hidden)}
        return shapes | ({self.head_bias: (vocabulary,)} if self.head_bias else {})

    def _norm(self, name: str, size: int) -> dict[str, Shape]:
        return {f"{name}.{kind}": (size,) for kind in self.norm_tensors}

    def _layer(self, config: Config) -> Layer:
        heads, hidden, skipped = self.heads(config), self.hidden(config), config.skipped
        shapes: dict[str, Shape] = {}
        for norm in self.norms:
            shapes |= self._norm(norm, hidden)
        units = {
            "heads": 0 if "attention" in skipped else heads.groups,
            "neurons": 0 if "mlp" in skipped else self.width(config),
        }
        if units["heads"]:
            shapes |= {f"{norm}.weight": (heads.size,) for norm in self.head_norms}
        parts = {"heads": self.attention, "neurons": self.ffn}
        columns = {"heads": heads.queries, "neurons": 1}
        for name, part in parts.items():
            if units[name]:
                shapes |= self._tensors(config, part, units[name], columns[name])
        groups = [self._group(name, config, shapes, units[name], columns[name]) for name in parts]
        return Layer(tuple(groups), shapes, self._attended(config))

    def _attended(self, config: Config) -> int:
        """What a query meets of every token, in numbers of all heads: keys and values."""
        heads = self.heads(config)
        return 2 * heads.heads * heads.size

    def _group(self, name: str, config: Config, shapes: Shapes, units: int, columns: int) -> Group:
        attends, heads = name == "heads", self.heads(config)
        part = self.attention if attends else self.ffn
        axes = _axes(part, units, heads.sizes, shapes, int(self.transposed))
        consumer = Consumer(part.consumer, columns, self.transposed)
        return Group(
            name=name,
            kind="attention" if attends else "ffn",
            title="KV groups" if attends else "FFN channels",
            num_units=units,
            axes=axes,
            consumer=consumer,
            block=Block(part.block, part.returns, self.scale(config), part.holds, part.flat),
            unit_parameters=unit_parameters(shapes, axes, consumer),
            cached=2 * heads.size if attends else 0,
            fixed=self.heads_stay if attends else self.width_stays,
        )

    def _tensors(self, config: Config, part: Part, units: int, columns: int) -> dict[str, Shape]:
        """Those that shrink with the units, and the consumer's bias."""
        hidden, sizes = self.hidden(config), self.heads(config).sizes
        outs = {name: units * sum(rows_of(p, sizes)) for name, p in part.producers.items()}
        shapes: dict[str, Shape] = {f"{name}.weight": (out, hidden) for name, out in outs.items()}
        shapes[f"{part.consumer}.weight"] = (hidden, units * columns)
        if self.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        for name, (first, *others) in part.follows.items():
            shapes[name] = (units * sizes[first], *(sizes[other] for other in others))
        biased = tuple(self.biased(config))
        for name, out in (outs | {part.consumer: hidden}).items():
            if biased and name.startswith(biased):
                shapes[f"{name}.bias"] = (out,)
        return shapes

    def layer_values(self, config: Config, layer: int) -> dict[str, object]:
        """What the config class works out from a layer's number."""
        return self.values_of_layer(config, layer)

    def layer_sizes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        """What the config of one layer says of its sizes; `skip` names absent blocks."""
        heads, keys, sizes = self.heads(config), self.keys, dict[str, object]()
        if kept["heads"]:
            sizes[keys.heads] = heads.each * kept["heads"]
            sizes |= {keys.kv_heads: kept["heads"]} if keys.kv_heads else {}
        if kept["neurons"] and keys.width:
            sizes[keys.width] = kept["neurons"]
        blocks = {"heads": "attention", "neurons": "mlp"}
        skipped = [block for name, block in blocks.items() if not kept[name]]
        return sizes | ({"skip": skipped} if skipped else {})

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """The family's own form with smaller sizes, or what `fewer_heads` says."""
        heads, keys = self.heads(config), self.keys
        stay = heads.each * kept["heads"]
        changes: dict[str, object] = {keys.heads: stay}
        changes |= {keys.kv_heads: kept["heads"]} if keys.kv_heads else {}
        changes |= {keys.head_dim: heads.size} if keys.head_dim else {}
        changes |= {keys.width: kept["neurons"]} if keys.width else {}
        stays = {"heads": (heads.groups, self.heads_stay)}
        stays["neurons"] = (self.width(config), self.width_stays)
        for name, (units, reason) in stays.items():
            if kept[name] != units and reason:
                raise SpecError(f"{config.model_type}: {reason}")
        if kept["heads"] == heads.groups:
            return Form(changes)
        found = self.fewer_heads(self, config, stay, target)
        changes = {key: value for key, value in changes.items() if key not in found.dropped}
        return replace(found, changes=changes | dict(found.changes))


def _axes(
    part: Part, units: int, sizes: Mapping[str, int], shapes: Shapes, dim: int
) -> tuple[Axis, ...]:
    axes = []
    for name, parts in part.producers.items():
        start = 0
        for rows in rows_of(parts, sizes):
            for tensor, along in ((f"{name}.weight", dim), (f"{name}.bias", 0)):
                if tensor in shapes:
                    axes.append(Axis(tensor, along, rows, start))
            start += rows * units
    axes += [Axis(name, 0, sizes[axis[0]]) for name, axis in part.follows.items()]
    return tuple(axis for axis in axes if axis.tensor in shapes)
