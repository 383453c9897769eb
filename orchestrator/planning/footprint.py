"""What a pruned model takes, in the units in which a budget can be given: from the dense model's
headers and the units that stay.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

from rayprune.specs.budget import BudgetSpec
from rayprune.specs.export import ExportSpec
from rayprune.specs.job import JobSpec
from rayprune.specs.latency import Phase, TimedPass, load_latency
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.config import DTYPES
from rayprune.workers.model.description import Group, Shapes
from rayprune.workers.model.folder import PLANNED_BYTES, TensorInfo
from rayprune.workers.model.form import AS_IT_IS, Form
from rayprune.workers.model.sites import sites_of
from rayprune.workers.model.sparsity import SEMI_STRUCTURED, bytes_not_held, read_sparsity

PHASES: tuple[Phase, ...] = ("prefill", "decode")
CHANGES = {
    "decoder_parameters": "lower budget.sparsity",
    "prefill_ms": "lower budget.tokens_per_second.prefill",
    "decode_ms": "lower budget.tokens_per_second.decode",
    "memory_bytes": "raise budget.memory.bytes",
}
"""What to change where a footprint takes too much, by field; of others the option of that name is
raised."""


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model, and what it takes to read one more token."""

    decoder_parameters: int
    parameters: int
    weight_bytes: int
    """Tensors on disk, without headers."""
    flops_per_token: int
    """Products with all weight matrices, two operations each; attention over earlier tokens comes
    on top.
    """
    kv_bytes_per_token: int
    """Keys and values that the cache keeps of one token, in the type of the weights."""
    latency_ms: float = 0.0
    """Milliseconds of a forward pass, from `budget.latency_table`; 0 without one."""
    prefill_ms: float = 0.0
    """Milliseconds of the pass that `budget.tokens_per_second.prefill` is counted with; 0: it is
    not asked for.
    """
    decode_ms: float = 0.0
    """The same of `budget.tokens_per_second.decode`."""
    memory_bytes: int = 0
    """Weights, without the zeros that a GPU does not hold, and keys and values of `budget.memory`;
    0: it is not asked for.
    """


def footprint(
    checkpoint: Checkpoint,
    layers: Sequence[Mapping[str, int]],
    job: JobSpec,
    there: Sequence[int] | None = None,
) -> Footprint:
    """The footprint of the model that keeps so many units per group in each of its layers, or of
    those that are still `there`; all of them, or none, are allowed.
    """
    model = checkpoint.model
    uniform = len(layers) > 0 and all(kept == layers[0] for kept in layers)
    stock = uniform and model.is_stock(layers[0])
    form = checkpoint.form(layers[0], job.export.form) if stock else AS_IT_IS
    shapes = form.outer_shapes({n: info.shape for n, info in checkpoint.outer_tensors.items()})
    shapes |= model.outer_parts(shapes, 0)  # parts of layers are counted with these
    outer = _sizes(shapes, checkpoint.outer_tensors, job.export)
    around = Footprint(
        0,
        sum(math.prod(shape) for shape, _ in outer.values()),
        _num_bytes(outer),
        2 * model.vocabulary * model.hidden if model.head else 0,
        0,
        **{name: timed.outer_ms for name, timed in counted_with(job.budget).items()},
        memory_bytes=_served(job.budget, _num_bytes(outer), 0),
    )
    numbers = range(len(layers)) if there is None else there
    alike = [
        (tuple(kept.items()), model.first_alike[number])
        for number, kept in zip(numbers, layers, strict=True)
    ]
    each = {key: layer_footprint(checkpoint, dict(key[0]), job, form, key[1]) for key in set(alike)}
    return footprint_sum([around, *(each[key] for key in alike)])


def footprint_sum(parts: Iterable[Footprint]) -> Footprint:
    """The footprint of several parts of a model together."""
    return Footprint(*map(sum, zip(*map(astuple, parts), strict=True)))


def layer_footprint(
    checkpoint: Checkpoint,
    kept: Mapping[str, int],
    job: JobSpec,
    form: Form = AS_IT_IS,
    layer: int = 0,
) -> Footprint:
    """The footprint of one layer, like this one of the model, that keeps so many units per group,
    written in a form; one that keeps nothing is left out.
    """
    if not any(kept.values()):
        return Footprint(0, 0, 0, 0, 0)
    export, budget, dense = job.export, job.budget, checkpoint.model.layers[layer]
    infos = checkpoint.layer_tensors(layer)
    cut = dense.cut_shapes(kept)
    sizes = _sizes(form.layer_shapes(cut), infos, export)
    model, outer = checkpoint.model, checkpoint.outer_tensors
    parts = model.outer_parts({n: info.shape for n, info in outer.items()}, 1)
    beside = _sizes(parts, outer, export)
    num_bytes = _num_bytes(sizes) + _num_bytes(beside)
    parameters = sum(math.prod(shape) for shape, _ in sizes.values())
    matrices = sum(math.prod(shape) for shape, _ in sizes.values() if len(shape) == 2)
    matrices -= sum(_idle(group, cut) for group in dense.groups if group.count > 1)
    matrices += model.token_inputs * model.hidden
    cached = sum(
        numbers * _element_bytes(infos[group.axes[0].tensor], export)
        for group in dense.groups
        if (numbers := group.cached_of(kept[group.name]))
    )
    return Footprint(
        parameters,
        parameters + sum(map(math.prod, parts.values())),
        num_bytes,
        2 * matrices,
        cached,
        **{name: timed.layer(kept) for name, timed in counted_with(budget).items()},
        memory_bytes=_served(budget, num_bytes - _not_held(job, checkpoint, cut, infos), cached),
    )


def counted_with(budget: BudgetSpec) -> dict[str, TimedPass]:
    """The measured passes that a budget is counted with, by the field of `Footprint` that each
    fills.

    Raises:
        SpecError: the table does not say which, or lacks one.
    """
    if budget.latency_table is None:
        return {}
    table, speed = load_latency(budget.latency_table), budget.tokens_per_second
    found: dict[str, TimedPass] = {}
    if budget.latency_ms or [timed.phase for timed in table.passes] == ["prefill"]:
        found["latency_ms"] = table.find("budget.latency_ms", "prefill", None, None)
    for phase in PHASES:
        if speed and getattr(speed, phase):
            option = f"budget.tokens_per_second.{phase}"
            found[f"{phase}_ms"] = table.find(option, phase, speed.batch, speed.tokens)
    return found


def _served(budget: BudgetSpec, weight_bytes: int, kv_bytes: int) -> int:
    """What a part of the model takes of `budget.memory`."""
    asked = budget.memory
    return weight_bytes + asked.batch * asked.context * kv_bytes if asked else 0


def _not_held(
    job: JobSpec, checkpoint: Checkpoint, shapes: Shapes, infos: Mapping[str, TensorInfo]
) -> int:
    """What a GPU saves of a layer's matrices with zeros."""
    masks = job.method.masks
    if masks is None or masks.pattern != SEMI_STRUCTURED:
        return 0
    sites = sites_of(checkpoint.model)
    return sum(
        bytes_not_held(
            shapes[name], _element_bytes(infos[name], job.export), sites[site].transposed
        )
        for site in masks.sites
        for name in sites[site].weights
    )


def saved_bytes(checkpoint: Checkpoint) -> int:
    """What a GPU saves of a model with zeros, from its folder.

    Raises:
        ModelError: the folder says nothing of zeros.
    """
    about, infos = read_sparsity(checkpoint.path), checkpoint.tensors
    if about.pattern != SEMI_STRUCTURED:
        return 0
    return sum(
        bytes_not_held(infos[name].shape, PLANNED_BYTES[infos[name].dtype], zeros.transposed)
        for name, zeros in about.tensors.items()
    )


def _idle(group: Group, shapes: Shapes) -> int:
    """Numbers in matrices of the experts that a token does not pass through."""
    passed = tuple(f"{group.block.module}.{expert}." for expert in range(group.active))
    inside = {n: s for n, s in shapes.items() if n.startswith(f"{group.block.module}.")}
    return sum(
        math.prod(shape)
        for name, shape in inside.items()
        if len(shape) == 2 and not name.startswith(passed)
    )


Sizes = dict[str, tuple[tuple[int, ...], int]]
"""Shape and bytes per element, by tensor."""


def _num_bytes(tensors: Sizes) -> int:
    return sum(math.prod(shape) * size for shape, size in tensors.values())


def _element_bytes(info: TensorInfo, export: ExportSpec) -> int:
    return PLANNED_BYTES[info.dtype if export.dtype == "auto" else DTYPES[export.dtype]]


def _sizes(shapes: Shapes, infos: Mapping[str, TensorInfo], export: ExportSpec) -> Sizes:
    """Tensors as they will be written; those that the form adds, in the widest type of the rest."""
    widest = max(_element_bytes(info, export) for info in infos.values())
    return {
        name: (shape, _element_bytes(infos[name], export) if name in infos else widest)
        for name, shape in shapes.items()
    }


def limits(budget: BudgetSpec, dense_decoder_parameters: int) -> dict[str, float]:
    """The most of a footprint that the budget allows, by field of `Footprint`."""
    speed, timed = budget.tokens_per_second, counted_with(budget)
    asked: dict[str, float | None] = {
        "decoder_parameters": (
            budget.sparsity and (1 - budget.sparsity) * dense_decoder_parameters + 1e-6
        ),
        "parameters": budget.parameters,
        "weight_bytes": budget.weight_bytes,
        "flops_per_token": budget.flops_per_token,
        "kv_bytes_per_token": budget.kv_bytes_per_token,
        "latency_ms": budget.latency_ms,
        "memory_bytes": budget.memory.bytes if budget.memory else None,
    }
    for phase in PHASES:
        if speed and (wanted := getattr(speed, phase)):
            asked[f"{phase}_ms"] = timed[f"{phase}_ms"].at_most(wanted)
    return {name: limit for name, limit in asked.items() if limit is not None}


def exceeded(size: Footprint, allowed: Mapping[str, float]) -> list[str]:
    """What to change, for everything that a footprint takes more of than is allowed."""
    over = {
        name: getattr(size, name) for name, limit in allowed.items() if getattr(size, name) > limit
    }
    return [
        f"{CHANGES.get(name, f'raise budget.{name}')} ({name.replace('_', ' ')}: {value:,}, and"
        f" {allowed[name]:,.0f} may stay)"
        for name, value in over.items()
    ]
