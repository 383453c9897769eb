"""What there is to know of a model: its layers, what is coupled in them, what a cut leaves. No
torch.

A config is parsed once, by its family, into a `Model`. Nothing outside `workers.model` knows a
family's name, a key of its config, or where its modules sit. Names of tensors and modules are those
inside a layer, unless said otherwise. Shapes are torch's: (out, in) for a linear map.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from rayprune.workers.model.places import Place

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Kind = Literal["attention", "ffn", "experts"]
PROBED_EXPERTS = 4
"""Experts of a layer at which output errors are predicted."""


@dataclass(frozen=True)
class Axis:
    """Where the units of a group lie along one axis of a tensor.

    Unit j has the entries `start + j * per_unit` to `start + (j + 1) * per_unit - 1` of axis `dim`.
    A fused matrix has several axes in one tensor, one for each block; entries of no axis stay.
    """

    tensor: str
    dim: int
    per_unit: int
    start: int = 0


@dataclass(frozen=True)
class Consumer:
    """The matrix that reads a group's units, `columns` of its inputs for each."""

    module: str
    columns: int
    transposed: bool = False
    """Whether its weight is (in, out), as that of GPT-2's Conv1D."""

    @property
    def weight(self) -> str:
        """Name of its weight."""
        return f"{self.module}.weight"

    @property
    def dim(self) -> int:
        """Axis of its weight along which its inputs lie."""
        return 0 if self.transposed else 1


@dataclass(frozen=True)
class Block:
    """The submodule that computes a group's consumer: what a stub stands in for."""

    module: str
    returns: int = 0
    """Length of the tuple it returns, its output first; 0: it returns the output."""
    scale: float | None = 1.0
    """What its output is multiplied by where it is added to the residual stream; None: it is not
    added as it is, something else works on it first."""
    tensors: tuple[str, ...] = ()
    """What names of the tensors begin with that go when no unit stays; empty: those of the
    module."""
    flat: bool = False
    """Whether it works on (B * T, D), where others work on (B, T, D)."""

    def holds(self, name: str) -> bool:
        """Whether a tensor of the layer goes when no unit stays."""
        return name.startswith(self.tensors or f"{self.module}.")


@dataclass(frozen=True)
class Group:
    """Units of a layer that go together: KV groups with their query heads, channels of an FFN, or
    whole experts, which the module that they form reads.

    `count` alike blocks (experts) each have `num_units` units and a consumer of their own; a token
    passes through `active` of them. What is decided for each is decided for one of `members`.
    """

    name: str
    kind: Kind
    title: str
    """What a unit is called: `KV groups`, `FFN channels`."""
    num_units: int
    axes: tuple[Axis, ...]
    consumer: Consumer
    block: Block
    unit_parameters: int
    """Parameters that go with one unit, biases included."""
    count: int = 1
    active: int = 1
    cached: int = 0
    """Numbers that a KV cache keeps of a token for every unit."""
    cached_always: int = 0
    """Those that it keeps of it whatever stays, as long as any unit does."""
    fixed: str | None = None
    """Why all units have to stay; None: they need not."""
    parts: int = 1
    """Units lie in so many parts, one behind the other, that have to lose alike."""
    fewest: int = 1
    """Units that have to stay."""
    weighs_input: bool = False
    """Of experts, one for each token: whether the router's weight multiplies what an expert is
    given, not what it returns."""
    multiple: int = 1
    """As many units stay as a multiple of this, unless all do."""
    times: tuple[str, int] | None = None
    """The group of which it keeps so many times the units, where one key says both."""
    expert: int | None = None
    """The number of the expert whose channels these are; None: they are of no expert."""
    routed: tuple[int, int] = (1, 1)
    """Of a token's experts and of all of them the numbers: the share of the tokens that reach one,
    on average.
    """

    @cached_property
    def members(self) -> "tuple[Group, ...]":
        """The group itself, or of `count` experts the group of each, whose tensors are named like
        those of the first with another number.
        """
        if self.count == 1:
            return (self,)
        return tuple(map(self._member, range(self.count)))

    def _member(self, expert: int) -> "Group":
        return replace(
            self.numbered(expert),
            name=member_name(self.name, expert),
            title=f"channels of expert {expert}",
            count=1,
            active=1,
            routed=(self.active, self.count),
        )

    def cached_of(self, kept: int) -> int:
        """Numbers that a KV cache keeps of a token where so many units stay."""
        return kept * self.cached + (self.cached_always if kept else 0)

    @property
    def probed(self) -> "tuple[Group, ...]":
        """The members at which output errors are predicted: all, or of experts some, evenly
        spaced.
        """
        count = min(PROBED_EXPERTS, self.count)
        return tuple(self.members[number * self.count // count] for number in range(count))

    def numbered(self, expert: int) -> "Group":
        """The group of an expert as its tensors would be named if the expert had this number."""
        old, new = (f"{self.block.module}.{number}." for number in (self.expert or 0, expert))
        axes = tuple(replace(axis, tensor=axis.tensor.replace(old, new)) for axis in self.axes)
        consumer = replace(self.consumer, module=self.consumer.module.replace(old, new))
        return replace(self, axes=axes, consumer=consumer, expert=expert)

    stock: str | None = None
    """Why the stock class holds no fewer units, where another class, or zeros in their place, do;
    None: it holds them."""
    some_stay: bool = False
    """Whether a layer keeps at least one unit."""

    @property
    def columns(self) -> int:
        """Columns of the consumer's input for each unit."""
        return self.consumer.columns

    @property
    def width(self) -> int:
        """Input width F of one consumer."""
        return self.num_units * self.columns

    @property
    def parameters(self) -> int:
        """Parameters of all units of all blocks."""
        return self.count * self.num_units * self.unit_parameters

    @property
    def all_axes(self) -> tuple[Axis, ...]:
        """Everything that shrinks with the units: `axes`, and the consumer's inputs."""
        return (*self.axes, Axis(self.consumer.weight, self.consumer.dim, self.columns))


def member_name(group: str, expert: int) -> str:
    """The name of the group of one expert."""
    return f"{group}.{expert}"


@dataclass(frozen=True)
class Layer:
    """One layer: its coupled groups in the order in which it computes them, and its tensors."""

    groups: tuple[Group, ...]
    shapes: Shapes
    attended: int
    """Numbers that a token's query meets for every token it looks at: scores and values, over all
    heads."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where tensors lie in the files that do not lie there by their names."""

    @property
    def parameters(self) -> int:
        """Number of elements of all its tensors."""
        return sum(map(prod, self.shapes.values()))

    @cached_property
    def members(self) -> dict[str, Group]:
        """What is decided one by one, by name: every group, of experts that of each."""
        return {member.name: member for group in self.groups for member in group.members}

    def group(self, name: str) -> Group:
        """The group of a name."""
        return next(group for group in self.groups if group.name == name)

    def cut_shapes(self, kept: Mapping[str, int]) -> dict[str, Shape]:
        """Shapes of its tensors when so many units of every group stay; those of an absent block
        are left out.
        """
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        for group in self.groups:
            lost = group.num_units - kept.get(group.name, group.num_units)
            if lost == group.num_units:
                shapes = {name: s for name, s in shapes.items() if not group.block.holds(name)}
                continue
            for axis in (axis for member in group.members for axis in member.all_axes):
                if axis.tensor in shapes:
                    shapes[axis.tensor][axis.dim] -= lost * axis.per_unit
            if group.kind == "experts":
                gone = range(group.num_units - lost, group.num_units)
                inside = tuple(f"{group.block.module}.{expert}." for expert in gone)
                shapes = {n: s for n, s in shapes.items() if not n.startswith(inside)}
        return {name: tuple(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class RemoteCode:
    """A class that travels with an exported folder because no stock class holds the model."""

    module: str
    """Name of its file, without the ending."""
    name: str
    """Name of the class."""
    text: str

    def auto_map(self, auto_class: str) -> dict[str, str]:
        """What the config of such a folder says of code."""
        return {auto_class: f"{self.module}.{self.name}"}


@dataclass(frozen=True)
class Model:
    """A model as its family describes it. Names here are those in the files, in full."""

    model_type: str
    auto_class: str
    """Name of the class of transformers that builds it."""
    layers: tuple[Layer, ...]
    """Layers that are alike are one object."""
    layers_at: str
    """Where the layers sit among the modules, and what their tensors' names begin with."""
    backbone: str
    """The module that runs from token ids to the last norm; empty: the whole model."""
    last_norm: str
    """The module behind the last layer; empty: there is none."""
    hidden: int
    vocabulary: int
    outer: Shapes
    """Tensors outside the layers; a head that is tied is left out."""
    embedding: str
    """The matrix of token embeddings."""
    head: str
    """The matrix of the output head over the vocabulary; empty: there is none."""
    tied: bool
    """Whether the head is the embedding matrix."""
    dtype: str
    """Type of the weights by the config, as torch calls it."""
    layer_returns: int = 0
    """Length of the tuple that a layer returns, hidden states first; 0: it returns those."""
    positions: int | None = None
    """Positions by the config, at most; None: it says none."""
    position_table: str | None = None
    """The matrix of learned positions; None: positions are computed."""
    module_names: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose names in the files are not those of the modules: file's name to module's."""
    recomputed: tuple[str, ...] = ()
    """Endings of tensors in old files that transformers computes itself."""
    routers: tuple[str, ...] = ()
    """Endings of matrices that stay in a wider type where the rest is quantised."""
    not_pruned: str | None = None
    """Why it can be planned, not pruned; None: it can be pruned."""
    sized_alike: str | None = None
    """Why its layers must keep the same numbers of units; None: they need not."""
    first_stays: str | None = None
    """Why the first layer has to stay; None: it need not."""
    last_stays: str | None = None
    """Why the last layer has to stay; None: it need not."""
    others_stay: Mapping[int, str] = field(default_factory=dict)
    """Further layers that have to stay, and why."""
    hands_on: bool = False
    """Whether the first layer returns, behind the hidden states, what the others are given."""
    token_inputs: int = 0
    """Numbers of a token that every layer is given beside the hidden states, which depend on the
    token alone."""
    layer_axes: tuple[Axis, ...] = ()
    """Where the layers' parts lie along tensors outside of them."""
    for_later: Mapping[str, int] = field(default_factory=dict)
    """Arguments in which layers leave what later ones read, and how many numbers of a token."""
    layers_differ: bool = False
    """Whether it was pruned to layers of different sizes."""
    caches: tuple[str, ...] = ()
    """For every layer which kind of slot it has in a KV cache; empty: all have the same."""
    code: RemoteCode | None = None
    """The class that builds it, where the stock one does not."""
    causal: bool = True
    """Whether a token sees those before it alone, and the head predicts the next one."""
    open_outside: bool = False
    """Whether its files may hold further tensors outside the layers, which go along as they are."""
    predictor: str = ""
    """The module that predicts from token ids; empty: the whole model."""
    beside: tuple[str, ...] = ()
    """Modules that text does not pass through: passes do without them."""
    older_names: Mapping[str, str] = field(default_factory=dict)
    """What names begin with in older files: theirs to today's."""
    left_out: tuple[str, ...] = ()
    """Beginnings of tensors that are not taken along."""
    why_left_out: str = ""
    """What they are of, and why they are not."""
    made_up: tuple[str, ...] = ()
    """Beginnings of tensors that files may lack: nothing that is measured reads them."""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every group that some layer has, in layer order, as in the last layer that has it."""
        return tuple(
            {group.name: group for layer in self.alike for group in layer[0].groups}.values()
        )

    @property
    def experts(self) -> Group | None:
        """The group of whole experts; None: there are none."""
        return next((group for group in self.groups if group.kind == "experts"), None)

    @property
    def units(self) -> dict[str, int]:
        """Units of every group."""
        return {group.name: group.num_units for group in self.groups}

    @property
    def stay(self) -> dict[int, str]:
        """The layers that have to stay, and why."""
        ends = {0: self.first_stays, self.num_layers - 1: self.last_stays}
        return {**self.others_stay, **{layer: why for layer, why in ends.items() if why}}

    def outer_parts(self, shapes: Shapes, layers: int) -> dict[str, Shape]:
        """Of tensors outside the layers, of these shapes, those that hold parts of layers, as they
        are with so many.
        """
        found: dict[str, Shape] = {}
        for axis in self.layer_axes:
            shape = shapes[axis.tensor]
            found[axis.tensor] = (
                *shape[: axis.dim],
                layers * axis.per_unit,
                *shape[axis.dim + 1 :],
            )
        return found

    def followed(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Units of some groups, and of those that keep so many times as many as one of them."""
        times = {group.name: group.times for group in self.groups if group.times}
        follow = {n: each * kept[name] for n, (name, each) in times.items() if name in kept}
        return {**kept, **follow}

    def led_by(self, name: str, layer: int) -> tuple[str, int] | None:
        """The group of a layer whose units this group's number says, and how many for each: itself,
        or where the layer lacks it one that follows it; None: there is none.
        """
        times = {group.name: group.times or (group.name, 1) for group in self.layers[layer].groups}
        if name in times:
            return name, 1
        return next(((n, each) for n, (led, each) in times.items() if led == name), None)

    @cached_property
    def lacking(self) -> dict[str, tuple[int, ...]]:
        """Layers without a group, of the groups that not all have."""
        found = {
            group.name: tuple(
                number
                for layer, numbers in self.alike
                if group.name not in [its.name for its in layer.groups]
                for number in numbers
            )
            for group in self.groups
        }
        return {name: numbers for name, numbers in found.items() if numbers}

    @cached_property
    def members(self) -> dict[str, Group]:
        """Those of all layers."""
        return {member.name: member for group in self.groups for member in group.members}

    @property
    def cached_numbers(self) -> int:
        """Numbers that a KV cache keeps of a token, in all layers."""
        groups = (group for layer in self.layers for group in layer.groups)
        return sum(group.cached_of(group.num_units) for group in groups)

    @property
    def predicts_masked(self) -> bool:
        """Whether its head predicts tokens that are masked."""
        return not self.causal and self.head != ""

    def is_stock(self, kept: Mapping[str, int]) -> bool:
        """Whether a stock class may hold layers that all keep so many units."""
        return not any(g.stock and kept.get(g.name, g.num_units) < g.num_units for g in self.groups)

    def names_of(self, kind: Kind) -> list[str]:
        """Names of the groups of a kind."""
        return [group.name for group in self.groups if group.kind == kind]

    @cached_property
    def alike(self) -> list[tuple[Layer, range]]:
        """Layers with the same groups and shapes that follow each other, together."""
        runs: list[tuple[Layer, range]] = []
        for number, layer in enumerate(self.layers):
            if runs and runs[-1][0] is layer:
                runs[-1] = (layer, range(runs[-1][1].start, number + 1))
            else:
                runs.append((layer, range(number, number + 1)))
        return runs

    @cached_property
    def first_alike(self) -> tuple[int, ...]:
        """For every layer the first one that is like it."""
        first: dict[int, int] = {}
        return tuple(first.setdefault(id(layer), n) for n, layer in enumerate(self.layers))

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self.layers_at}.{layer}."
