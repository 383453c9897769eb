"""The shapes a model can be pruned to: units that stay in every layer so that the budget is met,
and the parameters that remain.

Only the split between KV groups and neurons may stay open: there are then several shapes, each with
as many neurons as the budget allows beside its KV groups.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd, lcm

from rayprune.orchestrator.planning.footprint import Footprint, exceeded, footprint, limits
from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.mixtures import kept_experts
from rayprune.orchestrator.planning.rounding import channel_steps, unit_steps
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.methods.options import TakeOver
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.description import Model
from rayprune.workers.model.sites import check_widths

MAX_OPEN_SHAPES = 4


@dataclass(frozen=True)
class Shape:
    """Units that stay in every layer (the most, where layers differ), and what the model that
    results takes.

    See `Footprint`; None where it is only planned.
    """

    kept: Mapping[str, int]
    """Units per coupled group that stay in every layer; the most, where layers differ."""
    decoder_parameters: int
    parameters: int
    weight_bytes: int | None = None
    flops_per_token: int | None = None
    kv_bytes_per_token: int | None = None
    latency_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    memory_bytes: int | None = None
    layers: tuple[Mapping[str, int], ...] = ()
    """Units per coupled group of every layer, where layers differ."""

    def facts(self) -> dict[str, object]:
        """As it is recorded: what was not asked for of speed and memory is left out."""
        later = ("prefill_ms", "decode_ms", "memory_bytes")
        return {k: v for k, v in asdict(self).items() if k not in later or v}

    def kept_in(self, layer: int) -> dict[str, int]:
        """Units per coupled group that stay in one layer."""
        return dict(self.layers[layer] if self.layers else self.kept)

    def written_in(self, layer: int, pad: bool) -> dict[str, int]:
        """Units of one layer in its file: with `pad` as many as the layer with most keeps."""
        return dict(self.kept) if pad else self.kept_in(layer)

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
        layers = self.layers or (self.kept,)
        return {name: min(kept[name] for kept in layers) for name in self.kept}


def open_shapes(job: JobSpec, checkpoint: Checkpoint) -> tuple[Shape, ...]:
    """The shapes that meet the budget: for so many KV groups, the widest FFN.

    With `kv_groups: auto`, up to four: all groups, then one eighth of them fewer each time.

    Raises:
        SpecError: none meets the budget and loads.
    """
    dense = checkpoint.model.units
    masks = job.method.masks if job.method.cuts_first is None else None
    if masks:
        check_widths(checkpoint.model, masks)
    if masks or job.method.removes_nothing:
        return (Shape(dense, **asdict(_uniform(job, checkpoint, dense))),)
    if not exceeded(
        _uniform(job, checkpoint, dense), limits(job.budget, checkpoint.decoder_parameters)
    ):
        if job.method.cuts_first:
            raise SpecError(
                "budget: with its zeros the model meets every target, and no unit would go; ask for"
                " less, or leave out budget and method.inner"
            )
        raise SpecError(
            "budget: the model meets every target as it is, nothing would be removed; ask for less,"
            " or set budget.sparsity"
        )
    if isinstance(job.method.before_cut, TakeOver):
        return (_fewer_layers(job, job.method.before_cut, checkpoint, dense),)
    if job.sizes_differ and checkpoint.model.sized_alike:
        way = "it to false" if checkpoint.model.experts else "export.pad: true"
        raise SpecError(f"budget.per_layer: {checkpoint.model.sized_alike}; set {way}")
    shapes = []
    refusals = dict[str, str]()  # by what is said: of those that differ in numbers the last
    for kv_groups in _open_kv_groups(job, checkpoint):
        try:
            shapes.append(_widest(job, checkpoint, kv_groups))
        except SpecError as error:
            refusals[re.sub(r"\d[\d,.]*", "", str(error))] = str(error)
        if len(shapes) == MAX_OPEN_SHAPES:
            break
    if not shapes:
        sparsity = job.budget.sparsity
        goal = "meets it" if sparsity is None else f"removes {sparsity:.1%} of the decoder"
        raise SpecError(f"budget: no shape {goal}: " + "; ".join(refusals.values()))
    return tuple(shapes)


def _open_kv_groups(job: JobSpec, checkpoint: Checkpoint) -> list[int]:
    """Numbers of KV groups that may stay, the most first."""
    attention = [group for group in checkpoint.model.groups if group.kind == "attention"]
    most = max(group.num_units for group in attention)
    stock = next((g.stock for g in attention if g.stock and not job.budget.per_layer), None)
    steps = unit_steps(job, checkpoint.model)
    step = lcm(*(steps[group.name] for group in attention))
    asked, gpus = job.budget.kv_groups, job.export.tensor_parallel
    if asked != "auto":
        if asked > most:
            raise SpecError(f"budget.kv_groups: {asked} is more than the model's {most}")
        if asked % gcd(step, gpus):
            raise SpecError(
                f"budget.kv_groups: {asked} cannot be split over {gpus} GPUs"
                " (export.tensor_parallel); change one of them"
            )
        if stock and asked < most:
            raise SpecError(f"budget.kv_groups: {checkpoint.model.model_type}: {stock}")
        return [asked]
    if stock or any(group.fixed for group in attention):
        return [most]
    fewer = (count // step * step for count in range(most, 0, -max(1, most // 8)))
    return [count for count in dict.fromkeys(fewer) if count]


def _uniform(job: JobSpec, checkpoint: Checkpoint, kept: Mapping[str, int]) -> Footprint:
    """The footprint of a model whose layers are all alike.

    Raises:
        SpecError: no loader takes it.
    """
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
    caches, attention = checkpoint.model.caches, checkpoint.model.names_of("attention")
    first = [layer for layer in stay if caches and caches[layer] == caches[stay[0]]]
    attends = any(layers[layer][name] for layer in first for name in attention)
    if first and not job.export.pad and not attends:
        raise SpecError(
            f"no layer of {caches[stay[0]]} would keep its attention; set export.pad: true, or"
            " lower budget.allocation.most"
        )
    layers = [in_order(checkpoint.model, kept) for kept in layers]
    most = {name: max(kept[name] for kept in layers) for name in layers[0]}
    if job.export.pad:
        most |= {g.name: g.num_units for g in checkpoint.model.groups if g.stock}
    size = footprint(checkpoint, layers, job)
    return Shape(most, **asdict(size), layers=tuple(map(dict, layers)))


def _fewer_layers(
    job: JobSpec, protected: TakeOver, checkpoint: Checkpoint, dense: Mapping[str, int]
) -> Shape:
    """As many whole layers as meet every target; which ones go is not known yet, here the last ones
    do.

    Raises:
        SpecError: no number of layers meets them, or too many layers are protected.
    """
    allowed, nothing = limits(job.budget, checkpoint.decoder_parameters), dict.fromkeys(dense, 0)
    open_to_choice = range(protected.protect_first, checkpoint.num_layers - protected.protect_last)
    for layer, reason in checkpoint.model.stay.items():
        if layer in open_to_choice:
            raise SpecError(
                f"method {job.method.name}: layer {layer} has to stay: {reason}; protect it"
                " (method.protect_first, method.protect_last), or take budget.drop_layers"
            )
    for gone in range(1, checkpoint.num_layers):
        shape = uneven_shape(
            job, checkpoint, [dense] * (checkpoint.num_layers - gone) + [nothing] * gone
        )
        if not exceeded(footprint(checkpoint, shape.layers, job), allowed):
            break
    else:
        raise SpecError("budget: no number of whole layers meets it; ask for less")
    if gone > len(open_to_choice):
        raise SpecError(
            f"budget: {gone} of {checkpoint.num_layers} layers have to go, more than"
            f" method.protect_first ({protected.protect_first}) and method.protect_last"
            f" ({protected.protect_last}) leave open; lower one of them, or ask for less"
        )
    return shape


def _widest(job: JobSpec, checkpoint: Checkpoint, kv_groups: int) -> Shape:
    """The widest FFN that, with so many KV groups, meets every target.

    Raises:
        SpecError: there is none, or no loader takes it.
    """
    budget, model = job.budget, checkpoint.model
    steps = channel_steps(job, model)
    most, step = max((model.units[name], step) for name, step in steps.items())
    allowed = limits(budget, checkpoint.decoder_parameters)
    experts = kept_experts(job, checkpoint)

    def kept(width: int) -> dict[str, int]:
        shares = {n: _share(model.units[n], width, most, each) for n, each in steps.items()}
        shares |= dict.fromkeys(model.names_of("experts"), experts)
        for group in model.groups:
            if group.kind == "attention":
                shares[group.name] = min(group.num_units, kv_groups)
        return in_order(model, shares)

    def size(width: int) -> Footprint:
        return _uniform(job, checkpoint, kept(width))

    widths = [most, *range((most - 1) // step * step, 0, -step)]
    place = bisect_left(widths, True, key=lambda width: not exceeded(size(width), allowed))
    if place == len(widths):
        changes = ", ".join(exceeded(size(widths[-1]), allowed))
        raise SpecError(
            f"with {kv_groups} KV groups no FFN width of at least {step} channels"
            f" (budget.round_to) is left; {changes}, or lower budget.round_to or budget.kv_groups"
        )
    return Shape(kept(widths[place]), **asdict(size(widths[place])))


def in_order(model: Model, kept: Mapping[str, int]) -> dict[str, int]:
    """Units of every group in the order in which a layer computes them, those too that are so many
    times another's.
    """
    found = model.followed(kept)
    return {group.name: found[group.name] for group in model.groups}


def _share(count: int, width: int, most: int, round_to: int) -> int:
    """Of so many channels the fraction that `width` is of `most`, rounded down to a multiple."""
    return count if width == most else max(round_to, count * width // most // round_to * round_to)


def planned_shape(job: JobSpec, checkpoint: Checkpoint, kinds: tuple[LayerKind, ...]) -> Shape:
    """For a model that is only planned: KV groups and experts as asked for, and the same fraction
    of every FFN and expert's width.

    Raises:
        SpecError: no such fraction meets the budget.
    """
    sparsity = job.budget.sparsity
    if sparsity is None or len(limits(job.budget, checkpoint.decoder_parameters)) > 1:
        raise SpecError(
            "budget: a model that is only planned takes sparsity alone; leave the other targets out"
        )
    model, budget = checkpoint.model, job.budget
    attention = {
        name: model.units[name] if budget.kv_groups == "auto" else budget.kv_groups
        for name in model.names_of("attention")
    }
    attention = {name: min(count, model.units[name]) for name, count in attention.items()}
    experts = dict.fromkeys(model.names_of("experts"), kept_experts(job, checkpoint))
    steps = channel_steps(job, model)
    parts = max(model.units[name] // step for name, step in steps.items())
    for number in range(parts, 0, -1):
        part = number / parts
        narrowed = {n: _part(model.units[n], part, step) for n, step in steps.items()}
        kept = in_order(model, narrowed | attention | experts)
        removed = sum(kind.num_layers * _removed(kind, kept) for kind in kinds)
        if removed >= sparsity * checkpoint.decoder_parameters - 1e-6:
            dense, whole = checkpoint.decoder_parameters, checkpoint.parameters
            return Shape(kept, dense - removed, whole - removed)
    raise SpecError(
        f"budget: no shape removes {sparsity:.1%} of the decoder; lower budget.sparsity or"
        " budget.round_to"
    )


def _part(count: int, fraction: float, step: int) -> int:
    """A fraction of so many units, rounded down to a multiple, all of them where nothing is
    lost.
    """
    if fraction == 1:
        return count
    return max(min(step, count), int(count * fraction) // step * step)


def _removed(kind: LayerKind, kept: dict[str, int]) -> int:
    return sum(
        (group.num_units - kept[group.name]) * group.count * group.unit_parameters
        for group in kind.groups
    )
