"""The shapes a model can be pruned to: units that stay in every layer so that the budget is met,
and the parameters that remain.

Only the split between KV groups and neurons may stay open: there are then several shapes, each with
as many neurons as the budget allows beside its KV groups.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rayprune.orchestrator.planning.footprint import Footprint, exceeded, footprint, limits
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.methods.options import TakeOver
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.config_patch import layer_lists, patched_config
from rayprune.workers.model.families import unit_groups
from rayprune.workers.model.shapes import LayerKind

MAX_OPEN_SHAPES = 4


@dataclass(frozen=True)
class Shape:
    """Units that stay in every layer (the most, where layers differ), and what the model that
    results takes.

    See `Footprint`; None where it is only planned.
    """

    heads: int
    neurons: int
    decoder_parameters: int
    parameters: int
    weight_bytes: int | None = None
    flops_per_token: int | None = None
    kv_bytes_per_token: int | None = None
    latency_ms: float | None = None
    others: dict[str, int] = field(default_factory=dict)
    """Units of further groups, such as the experts' channels where some layers have none."""
    layers: tuple[Mapping[str, int], ...] = ()
    """Units per coupled group of every layer, where layers differ."""

    def kept_in(self, layer: int) -> dict[str, int]:
        """Units per coupled group that stay in one layer."""
        return dict(self.layers[layer]) if self.layers else self.kept

    def written_in(self, layer: int, pad: bool) -> dict[str, int]:
        """Units of one layer in its file: with `pad` as many as the layer with most keeps."""
        return self.kept if pad else self.kept_in(layer)

    def position(self, layer: int) -> int | None:
        """The number that a layer has among those of which something stays; None: nothing does, it
        is left out.
        """
        if not any(self.kept_in(layer).values()):
            return None
        return sum(any(self.kept_in(below).values()) for below in range(layer))

    def remaining(self, num_layers: int) -> list[int]:
        """The layers of which something stays."""
        return [layer for layer in range(num_layers) if self.position(layer) is not None]

    @property
    def narrowest(self) -> dict[str, int]:
        """Units per coupled group; the fewest of any layer."""
        return (
            {name: min(kept[name] for kept in self.layers) for name in self.kept}
            if self.layers
            else self.kept
        )

    @property
    def kept(self) -> dict[str, int]:
        """Units per coupled group that stay in every layer; the most, where layers differ."""
        return {"heads": self.heads, "neurons": self.neurons} | self.others


def units_by_group(kinds: tuple[LayerKind, ...]) -> dict[str, int]:
    """Units of every coupled group that some layer has, in layer order."""
    return {group.name: group.num_units for kind in kinds for group in kind.groups}


def open_shapes(job: JobSpec, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """The shapes that meet the budget: for so many KV groups, the widest FFN.

    With `kv_groups: auto`, up to four: all groups, then one eighth of them fewer each time.

    Raises:
        SpecError: none meets the budget and loads.
    """
    dense = {group.name: group.num_units for group in unit_groups(checkpoint.config)}
    if not exceeded(
        _uniform(job, checkpoint, dense), limits(job.budget, checkpoint.decoder_parameters)
    ):
        raise SpecError(
            "budget: the model meets every target as it is, nothing would be removed; ask for less,"
            " or set budget.sparsity"
        )
    if isinstance(job.method.before_cut, TakeOver):
        return (_fewer_layers(job, job.method.before_cut, checkpoint, dense),)
    groups = dense["heads"]
    if job.budget.kv_groups != "auto":
        if job.budget.kv_groups > groups:
            raise SpecError(
                f"budget.kv_groups: {job.budget.kv_groups} is more than the model's {groups}"
            )
        candidates = [job.budget.kv_groups]
    else:
        candidates = list(range(groups, 0, -max(1, groups // 8)))
    shapes, refusals = [], []
    for num_heads in candidates:
        try:
            shapes.append(_widest(job, checkpoint, num_heads))
        except SpecError as error:
            refusals.append(str(error))
        if len(shapes) == MAX_OPEN_SHAPES:
            break
    if not shapes:
        sparsity = job.budget.sparsity
        goal = "meets it" if sparsity is None else f"removes {sparsity:.1%} of the decoder"
        raise SpecError(f"budget: no shape {goal}: " + "; ".join(refusals))
    return tuple(shapes)


def _uniform(job: JobSpec, checkpoint: Checkpoint, kept: Mapping[str, int]) -> Footprint:
    """The footprint of a model whose layers are all alike.

    Raises:
        SpecError: no loader takes it.
    """
    patched_config(checkpoint.config, kept, job.export.target, job.export.dtype)
    return footprint(checkpoint, [kept] * checkpoint.num_layers, job)


def uneven_shape(
    job: JobSpec, checkpoint: Checkpoint, layers: Sequence[Mapping[str, int]]
) -> Shape:
    """The shape of a model whose layers keep different numbers of units.

    Raises:
        SpecError: it could not generate with a cache, which counts its tokens in the first layer's
            slot.
    """
    stay = [layer for layer, kept in enumerate(layers) if any(kept.values())]
    types = layer_lists(checkpoint.config).get("layer_types")
    if (
        types
        and stay
        and not job.export.pad
        and not any(layers[layer]["heads"] for layer in stay if types[layer] == types[stay[0]])
    ):
        raise SpecError(
            f"no layer of {types[stay[0]]} would keep its attention; set export.pad: true, or lower"
            " budget.allocation.most"
        )
    most = {name: max(kept[name] for kept in layers) for name in layers[0]}
    size = footprint(checkpoint, layers, job)
    return Shape(most["heads"], most["neurons"], **asdict(size), layers=tuple(map(dict, layers)))


def _fewer_layers(
    job: JobSpec, protected: TakeOver, checkpoint: Checkpoint, dense: Mapping[str, int]
) -> Shape:
    """As many whole layers as meet every target; which ones go is not known yet, here the last ones
    do.

    Raises:
        SpecError: no number of layers meets them, or too many layers are protected.
    """
    allowed, nothing = limits(job.budget, checkpoint.decoder_parameters), dict.fromkeys(dense, 0)
    for gone in range(1, checkpoint.num_layers):
        shape = uneven_shape(
            job, checkpoint, [dense] * (checkpoint.num_layers - gone) + [nothing] * gone
        )
        if not exceeded(footprint(checkpoint, shape.layers, job), allowed):
            break
    else:
        raise SpecError("budget: no number of whole layers meets it; ask for less")
    if gone > checkpoint.num_layers - protected.protect_first - protected.protect_last:
        raise SpecError(
            f"budget: {gone} of {checkpoint.num_layers} layers have to go, more than"
            f" method.protect_first ({protected.protect_first}) and method.protect_last"
            f" ({protected.protect_last}) leave open; lower one of them, or ask for less"
        )
    return shape


def _widest(job: JobSpec, checkpoint: Checkpoint, num_heads: int) -> Shape:
    """The widest FFN that, with so many KV groups, meets every target.

    Raises:
        SpecError: there is none, or no loader takes it.
    """
    budget, neurons = job.budget, unit_groups(checkpoint.config)[1].num_units
    allowed = limits(budget, checkpoint.decoder_parameters)

    def size(width: int) -> Footprint:
        return _uniform(job, checkpoint, {"heads": num_heads, "neurons": width})

    widths = [
        neurons,
        *range((neurons - 1) // budget.round_to * budget.round_to, 0, -budget.round_to),
    ]
    place = bisect_left(widths, True, key=lambda width: not exceeded(size(width), allowed))
    if place == len(widths):
        changes = ", ".join(exceeded(size(widths[-1]), allowed))
        raise SpecError(
            f"with {num_heads} KV groups no FFN width of at least budget.round_to"
            f" ({budget.round_to}) is left; {changes}, or lower budget.round_to or budget.kv_groups"
        )
    return Shape(num_heads, widths[place], **asdict(size(widths[place])))


def planned_shape(job: JobSpec, checkpoint: Checkpoint, kinds: tuple[LayerKind, ...]) -> Shape:
    """For a model that is only planned: KV groups as asked for, and the same fraction of every FFN
    and expert.

    Raises:
        SpecError: no such fraction meets the budget.
    """
    sparsity = job.budget.sparsity
    if sparsity is None or len(limits(job.budget, checkpoint.decoder_parameters)) > 1:
        raise SpecError(
            "budget: a model that is only planned takes sparsity alone; leave the other targets out"
        )
    units = units_by_group(kinds)
    heads = (
        units["heads"]
        if job.budget.kv_groups == "auto"
        else min(job.budget.kv_groups, units["heads"])
    )
    steps = max(units.values()) // job.budget.round_to
    for step in range(steps, 0, -1):
        kept = {
            name: _part(count, step / steps, job.budget.round_to) for name, count in units.items()
        } | {"heads": heads}
        removed = sum(kind.num_layers * _removed(kind, kept) for kind in kinds)
        if removed >= sparsity * checkpoint.decoder_parameters - 1e-6:
            others = {
                name: count for name, count in kept.items() if name not in ("heads", "neurons")
            }
            return Shape(
                heads,
                kept["neurons"],
                checkpoint.decoder_parameters - removed,
                checkpoint.parameters - removed,
                others=others,
            )
    raise SpecError(
        f"budget: no shape removes {sparsity:.1%} of the decoder; lower budget.sparsity or"
        " budget.round_to"
    )


def _part(count: int, fraction: float, round_to: int) -> int:
    """A fraction of so many units, rounded down to a multiple, all of them where nothing is
    lost.
    """
    return (
        count
        if fraction == 1
        else max(min(round_to, count), int(count * fraction) // round_to * round_to)
    )


def _removed(kind: LayerKind, kept: dict[str, int]) -> int:
    return sum(
        (group.num_units - kept[group.name]) * group.count * group.unit_parameters
        for group in kind.groups
    )
