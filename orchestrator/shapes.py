"""The shapes a model can be pruned to: units that stay in every layer so that the budget is met, and the parameters that remain.

Only the split between KV groups and neurons may stay open: there are then several shapes, each with as many neurons as
the budget allows beside its KV groups.
"""

import math
from dataclasses import dataclass, field

from specs.errors import SpecError
from specs.job import JobSpec
from workers.checkpoint import Checkpoint
from workers.config_patch import needs_output_bias, patched_config
from workers.families import UnitGroup, unit_groups, unit_parameters
from workers.shapes import LayerKind

MAX_OPEN_SHAPES = 4


@dataclass(frozen=True)
class Shape:
    """Units that stay in every layer, and the parameters of the model that results."""

    heads: int
    neurons: int
    decoder_parameters: int
    parameters: int
    others: dict[str, int] = field(default_factory=dict)
    """Units of further groups, such as the experts' channels where some layers have none."""

    @property
    def kept(self) -> dict[str, int]:
        """Units per coupled group."""
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
    heads, neurons = unit_groups(checkpoint.config)
    if job.budget.kv_groups != "auto":
        if job.budget.kv_groups > heads.num_units:
            raise SpecError(f"budget.kv_groups: {job.budget.kv_groups} is more than the model's {heads.num_units}")
        candidates = [job.budget.kv_groups]
    else:
        candidates = list(range(heads.num_units, 0, -max(1, heads.num_units // 8)))[:MAX_OPEN_SHAPES]
    shapes, refusals = [], []
    for num_heads in candidates:
        try:
            shapes.append(_widest(job, checkpoint, heads, neurons, num_heads))
        except SpecError as error:
            refusals.append(str(error))
    if not shapes:
        raise SpecError(f"budget: no shape removes {job.budget.sparsity:.1%} of the decoder: " + "; ".join(refusals))
    return tuple(shapes)


def _widest(job: JobSpec, checkpoint: Checkpoint, heads: UnitGroup, neurons: UnitGroup, num_heads: int) -> Shape:
    """The widest FFN that, with so many KV groups, removes enough."""
    names = {name: info.shape for name, info in checkpoint.layer_tensors(0).items()}
    layers, round_to = checkpoint.num_layers, job.budget.round_to
    target = math.ceil(job.budget.sparsity * checkpoint.decoder_parameters - 1e-6)
    by_heads = layers * (heads.num_units - num_heads) * unit_parameters(names, heads)
    patched = patched_config(checkpoint.config, {"heads": num_heads, "neurons": neurons.num_units}, job.export.target, job.export.dtype)
    if needs_output_bias(checkpoint.config, patched):
        by_heads -= layers * names["self_attn.o_proj.weight"][0]
    per_neuron = layers * unit_parameters(names, neurons)
    width = neurons.num_units
    if by_heads < target:
        width = (neurons.num_units - math.ceil((target - by_heads) / per_neuron)) // round_to * round_to
    if width < 1:
        raise SpecError(
            f"with {num_heads} KV groups no FFN width of at least budget.round_to ({round_to}) is left; "
            "lower budget.sparsity, budget.round_to or budget.kv_groups"
        )
    removed = by_heads + (neurons.num_units - width) * per_neuron
    return Shape(num_heads, width, checkpoint.decoder_parameters - removed, checkpoint.parameters - removed)


def planned_shape(job: JobSpec, checkpoint: Checkpoint, kinds: tuple[LayerKind, ...]) -> Shape:
    """For a model that is only planned: KV groups as asked for, and the same fraction of every FFN and expert.

    Raises:
        SpecError: no such fraction meets the budget.
    """
    units = units_by_group(kinds)
    heads = units["heads"] if job.budget.kv_groups == "auto" else min(job.budget.kv_groups, units["heads"])
    steps = max(units.values()) // job.budget.round_to
    for step in range(steps, 0, -1):
        kept = {name: _part(count, step / steps, job.budget.round_to) for name, count in units.items()} | {"heads": heads}
        removed = sum(kind.num_layers * _removed(kind, kept) for kind in kinds)
        if removed >= job.budget.sparsity * checkpoint.decoder_parameters - 1e-6:
            others = {name: count for name, count in kept.items() if name not in ("heads", "neurons")}
            return Shape(heads, kept["neurons"], checkpoint.decoder_parameters - removed, checkpoint.parameters - removed, others)
    raise SpecError(f"budget: no shape removes {job.budget.sparsity:.1%} of the decoder; lower budget.sparsity or budget.round_to")


def _part(count: int, fraction: float, round_to: int) -> int:
    """A fraction of so many units, rounded down to a multiple, all of them where nothing is lost."""
    return count if fraction == 1 else max(min(round_to, count), int(count * fraction) // round_to * round_to)


def _removed(kind: LayerKind, kept: dict[str, int]) -> int:
    return sum((group.num_units - kept[group.name]) * group.count * group.unit_parameters for group in kind.groups)
