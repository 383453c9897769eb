"""Decoders whose FFN is a mixture of experts in every layer: what differs is data.

Matrices of the experts are described one by one, `mlp.experts.3.up_proj.weight`, however they lie
in the files (`places`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Axis, Block, Consumer, Group, Layer, Shape, Shapes
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.family import MOST_LAYERS
from rayprune.workers.model.families.parts import unit_parameters
from rayprune.workers.model.form import Form
from rayprune.workers.model.places import Place, Places

GATE, UP, DOWN = MATRICES = ("gate_proj", "up_proj", "down_proj")
MULTIPLE = 8
"""Of channels that an expert keeps: products of all experts at once want rows of 16 bytes."""


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
    parts: Callable[[Config], int] = lambda config: 1
    """Groups of experts among which the router chooses first."""
    places: Callable[[int], Places] = lambda count: {}
    """Where so many experts lie in the files, if not by the names of their modules."""

    def counted_by(self, config: Config) -> list[str]:
        """The keys of a config that say how many."""
        return [key for key in self.count if key in config.raw] or [self.count[-1]]


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


@dataclass(frozen=True)
class Mixture(Decoder):
    """A family with experts in every layer."""

    experts: Experts = Experts()
    shared: Shared | None = None

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
        return Layer(groups, shapes, 2 * heads.heads * heads.size, self.experts.places(count))

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
        return (beside, *found) if self.shared.first else (*found, beside)

    def _whole_experts(self, config: Config, shapes: Shapes, count: int, active: int) -> Group:
        at, parts = self.experts.at, self.experts.parts(config)
        if count % parts:
            raise ModelError(f"{config.file}: {count} experts do not form {parts} groups")
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
            parts=parts,
            fewest=active,
        )

    def layer_sizes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        """What a config says of a layer that keeps so many units."""
        return dict(self._changes(config, kept))

    def _changes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        heads, keys = self.heads(config), self.keys
        changes: dict[str, object] = {keys.heads: heads.each * kept["heads"]}
        changes |= {keys.kv_heads: kept["heads"]} if keys.kv_heads else {}
        changes |= {keys.head_dim: heads.size} if keys.head_dim else {}
        changes |= dict.fromkeys(self.experts.counted_by(config), kept["experts"])
        changes |= {self.experts.width: kept["neurons"]}
        if self.shared and self.shared.key:
            changes |= {self.shared.key: kept["shared"]}
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
        if self.shared and not self.shared.key:
            times = self.shared.width(config) // dense
            if kept["shared"] != times * width:
                raise SpecError(
                    f"{config.model_type}: shared experts have {times} times the width of the"
                    f" others, not {kept['shared']} beside {width}"
                )
        changes = self._changes(config, kept)
        places = self.experts.places(kept["experts"])
        if kept["heads"] == heads.groups:
            return Form(changes, places=places)
        found = self.fewer_heads(self, config, heads.each * kept["heads"], target)
        return replace(found, changes=changes | dict(found.changes), places=places)


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
