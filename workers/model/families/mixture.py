"""Decoders whose FFN is a mixture of experts, in every layer or in most: what differs is data.

Matrices of the experts are described one by one, `mlp.experts.3.up_proj.weight`, however they lie
in the files (`places`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
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
    Shape,
    Shapes,
)
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.family import MOST_LAYERS
from rayprune.workers.model.families.parts import unit_parameters
from rayprune.workers.model.form import Form
from rayprune.workers.model.places import Place, Places

GATE, UP, DOWN = MATRICES = ("gate_proj", "up_proj", "down_proj")
MULTIPLE = 8
"""Of channels that an expert keeps: products of all experts at once want rows of 16 bytes."""

GUESSING = "num_nextn_predict_layers"
"""The key of layers that guess further tokens, which are of the model as it was: they stay
behind."""


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: keys of the config, and names of modules."""

    count: tuple[str, ...] = ("num_local_experts", "num_experts")
    """Keys that say how many: of those that a config has the first counts."""
    active: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    at: str = "mlp.experts"
    """Their module."""
    router: tuple[str, ...] = ("mlp.gate.weight",)
    """Tensors with a row for each expert: matrices, and vectors."""
    biased: bool = False
    """Whether their matrices have biases."""
    weighs_input: bool = False
    """Whether the router's weight multiplies what an expert is given, not what it returns."""
    parts: "Callable[[Config], Parts]" = lambda config: Parts()
    places: Callable[[int], Places] = lambda count: {}
    """Where so many experts lie in the files, if not by the names of their modules."""

    def counted_by(self, config: Config) -> list[str]:
        """The keys of a config that say how many."""
        return [key for key in self.count if key in config.raw] or [self.count[-1]]


@dataclass(frozen=True)
class Parts:
    """Groups of experts among which the router chooses first."""

    count: int = 1
    chosen: int = 1
    """How many it chooses."""
    judged: int = 1
    """The experts of each by which it does."""

    def fewest(self, active: int) -> int:
        """Experts with which so many can be chosen for a token."""
        return self.count * max(self.judged, -(-active // self.chosen))


def grouped(count: int, chosen: int, judged: int = 1) -> Callable[[Config], Parts]:
    """As many groups as the config says, or so many."""
    return lambda config: Parts(
        config.integer("n_group", count), config.integer("topk_group", chosen), judged
    )


@dataclass(frozen=True)
class Dense:
    """Which layers have an FFN in place of experts."""

    at: Callable[[Config, int], bool]
    said: Callable[[Sequence[bool]], Mapping[str, object]]
    """The keys that say of every layer whether it does."""


def first_dense(default: int) -> Dense:
    """The first layers have, as many as a key says, or so many."""
    key = "first_k_dense_replace"

    def _at(config: Config, layer: int) -> bool:
        # none is 0, which is no size
        return layer < (config.integer(key, default) if config.raw.get(key, default) else 0)

    return Dense(_at, lambda dense: {key: sum(dense)})


@dataclass(frozen=True)
class Shared:
    """An FFN that every token passes through beside the experts."""

    at: str
    """Its module."""
    width: Callable[[Config], int]
    key: str | None = None
    """The key of its width; None: it is a multiple of the experts'."""
    first: bool = False
    """Whether it is computed before the experts."""
    flat: bool = False
    """Whether it works on (B * T, D)."""
    scale: float | None = 1.0
    """What its output is multiplied by; None: something else works on it first."""
    beside: Mapping[str, Callable[[int], Shape]] | None = None
    """Further tensors, which stay: shapes by the hidden size."""


def several_shared(default: int) -> Shared:
    """As many shared experts as the config says, or so many, as one FFN of their widths
    together."""
    return Shared(
        "mlp.shared_experts",
        width=lambda config: (
            config.integer("n_shared_experts", default) * config.integer("moe_intermediate_size")
        ),
    )


@dataclass(frozen=True)
class Mixture(Decoder):
    """A family with experts in its layers."""

    experts: Experts = Experts()
    shared: Shared | None = None
    dense: Dense | None = None
    """None: every layer has experts."""

    def describe(self, config: Config) -> Model:
        """The model that a config says.

        Raises:
            ModelError: no layer has experts.
        """
        model = replace(
            super().describe(config),
            routers=self.experts.router,
            left_out=self._guessing(config),
            why_left_out="multi-token prediction are left out: their layers guess from the model as"
            " it was; the pruned one generates without them",
        )
        if model.experts is None:
            raise ModelError(
                f"{config.file}: no layer has experts, which a {config.model_type} without is not"
                " pruned; correct it"
            )
        return model

    def _guessing(self, config: Config) -> tuple[str, ...]:
        """What names begin with of the layers of multi-token prediction, behind the others."""
        count = self.count_layers(config)
        more = config.integer(GUESSING) if config.raw.get(GUESSING) else 0
        return tuple(f"{self.layers_at}.{count + number}." for number in range(more))

    def _layers(self, config: Config) -> tuple[Layer, ...]:
        dense = [
            self.dense is not None and self.dense.at(config, number)
            for number in range(self.count_layers(config))
        ]
        if config.layers_differ:
            own = [self.of_layer(config, number) for number in range(len(dense))]
            return tuple(map(self._made, own, dense))
        kinds = {kind: self._made(config, kind) for kind in set(dense)}
        return tuple(kinds[kind] for kind in dense)

    def _made(self, config: Config, dense: bool) -> Layer:
        """A layer with experts, or with an FFN in their place; some units of every group stay."""
        layer = super()._layer(config) if dense else self._layer(config)
        groups = [
            _of_dense(group) if dense and group.kind == "ffn" else group for group in layer.groups
        ]
        return replace(layer, groups=tuple(replace(group, some_stay=True) for group in groups))

    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The keys that say that these layers stay, and which of them have experts."""
        found = super().keeping(config, layers)
        if self.dense:
            found |= self.dense.said([self.dense.at(config, layer) for layer in layers])
        return found

    def count_experts(self, config: Config) -> int:
        """Experts of a layer."""
        return config.integer(self.experts.counted_by(config)[0], most=MOST_LAYERS)

    def expert_width(self, config: Config) -> int:
        """Channels of one expert."""
        return config.integer(self.experts.width)

    def _layer(self, config: Config) -> Layer:
        heads, hidden = self.heads(config), self.hidden(config)
        shapes: dict[str, Shape] = {}
        for norm in self.norms:
            shapes |= self._norm(norm, hidden)
        shapes |= {f"{norm}.weight": (heads.size,) for norm in self.head_norms}
        shapes |= self._tensors(config, self.attention, heads.groups, heads.queries)
        count, width = self.count_experts(config), self.expert_width(config)
        for name in self.experts.router:
            shapes[name] = (count, hidden) if name.endswith("weight") else (count,)
        for expert in range(count):
            at = f"{self.experts.at}.{expert}."
            shapes |= _ffn_shapes(at, hidden, width, self.experts.biased)
        if self.shared:
            shapes |= _ffn_shapes(f"{self.shared.at}.", hidden, self.shared.width(config), False)
            shapes |= {n: shape(hidden) for n, shape in (self.shared.beside or {}).items()}
        attention = self._group("heads", config, shapes, heads.groups, heads.queries)
        groups = (attention, *self._mixture(config, shapes))
        return Layer(groups, shapes, self._attended(config), self.experts.places(count))

    def _mixture(self, config: Config, shapes: Shapes) -> tuple[Group, ...]:
        """Whole experts, their channels, and those of the shared one, as they are computed."""
        count, active = self.count_experts(config), config.integer(self.experts.active)
        if active > count:
            raise ModelError(
                f"{config.file}: {self.experts.active} ({active}) is more than the experts"
                f" ({count})"
            )
        whole = self._whole_experts(config, shapes, count, active)
        first = f"{self.experts.at}.0."
        channels = _channels("neurons", "expert channels", first, shapes, whole.block)
        channels = replace(channels, count=count, active=active, multiple=MULTIPLE)
        found = (whole, channels)
        if not self.shared:
            return found
        at, scale = self.shared.at, self.scale(config)
        scale = None if None in (scale, self.shared.scale) else scale
        block = Block(at, scale=scale, flat=self.shared.flat)
        beside = _channels("shared", "shared channels", f"{at}.", shapes, block)
        if not self.shared.key:
            beside = replace(beside, times=("neurons", beside.num_units // channels.num_units))
        return (beside, *found) if self.shared.first else (*found, beside)

    def _whole_experts(self, config: Config, shapes: Shapes, count: int, active: int) -> Group:
        at, parts = self.experts.at, self.experts.parts(config)
        if count % parts.count:
            raise ModelError(f"{config.file}: {count} experts do not form {parts.count} groups")
        if (least := max(active, parts.fewest(active))) > count:
            raise ModelError(
                f"{config.file}: its router needs {least} experts to choose {active}, not {count};"
                " correct it"
            )
        rows = sum(prod(shapes[name]) // count for name in self.experts.router)
        inside = sum(prod(shape) for name, shape in shapes.items() if name.startswith(f"{at}.0."))
        return Group(
            name="experts",
            kind="experts",
            title="experts",
            num_units=count,
            axes=tuple(Axis(name, 0, 1) for name in self.experts.router),
            consumer=Consumer(at, 1),
            block=Block(at, scale=self.scale(config), flat=True),
            unit_parameters=rows + inside,
            parts=parts.count,
            fewest=least,
            weighs_input=self.experts.weighs_input,
        )

    def layer_sizes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        """What a config says of a layer that keeps so many units."""
        return dict(self._changes(config, kept))

    def layer_form(self, config: Config, kept: Mapping[str, int]) -> Form:
        """How a layer is written that keeps so many units, where layers differ."""
        del config
        return Form(places=self.experts.places(kept["experts"]))

    def _changes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        heads, keys = self.heads(config), self.keys
        changes: dict[str, object] = {keys.heads: heads.each * kept["heads"]}
        changes |= {keys.kv_heads: kept["heads"]} if keys.kv_heads else {}
        changes |= {keys.head_dim: heads.size} if keys.head_dim else {}
        changes |= dict.fromkeys(self.experts.counted_by(config), kept["experts"])
        changes |= {self.experts.width: kept["neurons"]}
        if self.shared and self.shared.key:
            changes |= {self.shared.key: kept["shared"]}
        if "dense" in kept and keys.width:
            changes |= {keys.width: kept["dense"]}
        return changes

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """The family's own form with fewer experts and smaller sizes.

        Raises:
            SpecError: it would load and not run, or holds other sizes than are kept.
        """
        heads = self.heads(config)
        if kept["heads"] != heads.groups and self.heads_stay:
            raise SpecError(f"{config.model_type}: {self.heads_stay}")
        width, dense = kept["neurons"], self.expert_width(config)
        if width != dense and width % MULTIPLE:
            raise SpecError(
                f"{config.model_type} cannot run experts of {width} channels: products of all"
                f" experts at once want a multiple of {MULTIPLE}"
            )
        changes = self._changes(config, kept)
        changes |= {GUESSING: 0} if config.raw.get(GUESSING) else {}
        places = self.experts.places(kept["experts"])
        if kept["heads"] == heads.groups:
            return Form(changes, places=places)
        found = self.fewer_heads(self, config, heads.each * kept["heads"], target)
        return replace(found, changes=changes | dict(found.changes), places=places)


def _of_dense(group: Group) -> Group:
    return replace(group, name="dense", title="dense FFN channels")


def _ffn_shapes(at: str, hidden: int, width: int, biased: bool) -> dict[str, Shape]:
    sizes = {GATE: (width, hidden), UP: (width, hidden), DOWN: (hidden, width)}
    shapes: dict[str, Shape] = {f"{at}{name}.weight": size for name, size in sizes.items()}
    return shapes | ({f"{at}{n}.bias": size[:1] for n, size in sizes.items()} if biased else {})


def _channels(name: str, title: str, at: str, shapes: Shapes, block: Block) -> Group:
    axes = tuple(
        Axis(f"{at}{matrix}.{kind}", 0, 1)
        for matrix, kind in product((GATE, UP), ("weight", "bias"))
        if f"{at}{matrix}.{kind}" in shapes
    )
    consumer = Consumer(f"{at}{DOWN}", 1)
    return Group(
        name=name,
        kind="ffn",
        title=title,
        num_units=shapes[f"{at}{GATE}.weight"][0],
        axes=axes,
        consumer=consumer,
        block=block,
        unit_parameters=unit_parameters(shapes, axes, consumer),
    )


def packed(
    at: str,
    tensors: tuple[str, str],
    interleaved: bool = False,
    transposed: bool = False,
    biases: tuple[str, str] | None = None,
    others: Mapping[str, str] | None = None,
) -> Callable[[int], Places]:
    """Experts that lie in the files as two tensors of all of them, gate with up, and down; and
    other tensors.
    """

    def _places(count: int) -> Places:
        found = {own: Place(name) for own, name in (others or {}).items()}
        kinds = {"weight": tensors} | ({"bias": biases} if biases else {})
        for kind, (gate_up, down) in kinds.items():
            turned = transposed and kind == "weight"
            for expert in range(count):
                inside = f"{at}.{expert}."
                for block, name in enumerate((GATE, UP)):
                    found[f"{inside}{name}.{kind}"] = Place(
                        gate_up, expert, block, 2, interleaved, turned
                    )
                found[f"{inside}{DOWN}.{kind}"] = Place(down, expert, transposed=turned)
        return found

    return _places


def renamed(
    at: str, names: tuple[str, str, str], stored_at: str, others: Mapping[str, str] | None = None
) -> Callable[[int], Places]:
    """Matrices of the experts that are called otherwise in the files: gate, up, down; and other
    tensors.
    """

    def _places(count: int) -> Places:
        inside = {
            f"{at}.{expert}.{own}.weight": Place(f"{stored_at}.{expert}.{name}.weight")
            for expert, (own, name) in product(range(count), zip(MATRICES, names, strict=True))
        }
        return inside | {own: Place(name) for own, name in (others or {}).items()}

    return _places
