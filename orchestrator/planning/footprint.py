"""What a pruned model takes, in the units in which a budget can be given: from the dense model's
headers and the units that stay.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

from rayprune.specs.job import BudgetSpec, ExportSpec, JobSpec
from rayprune.specs.latency import load_latency
from rayprune.workers.model.checkpoint import DTYPES, PLANNED_BYTES, Checkpoint, TensorInfo
from rayprune.workers.model.config_patch import needs_output_bias
from rayprune.workers.model.families import config_int, unit_groups


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


def footprint(
    checkpoint: Checkpoint, layers: Sequence[Mapping[str, int]], job: JobSpec
) -> Footprint:
    """The footprint of the model that keeps so many units per group in each of its layers; all of
    them, or none, are allowed.
    """
    table = job.budget.latency_table
    outer = {
        name: (info.shape, _element_bytes(info, job.export))
        for name, info in checkpoint.outer_tensors.items()
    }
    head = config_int(checkpoint.config, "vocab_size") * config_int(
        checkpoint.config, "hidden_size"
    )
    outside_ms = load_latency(table).outer_ms if table else 0.0
    around = Footprint(
        0,
        sum(math.prod(shape) for shape, _ in outer.values()),
        _num_bytes(outer),
        2 * head,
        0,
        outside_ms,
    )
    alike = [tuple(kept.items()) for kept in layers]
    each = {items: layer_footprint(checkpoint, dict(items), job) for items in set(alike)}
    return footprint_sum([around, *(each[items] for items in alike)])


def footprint_sum(parts: Iterable[Footprint]) -> Footprint:
    """The footprint of several parts of a model together."""
    return Footprint(*map(sum, zip(*map(astuple, parts), strict=True)))


def layer_footprint(checkpoint: Checkpoint, kept: Mapping[str, int], job: JobSpec) -> Footprint:
    """The footprint of one layer that keeps so many units per group; one that keeps nothing is left
    out.
    """
    if not any(kept.values()):
        return Footprint(0, 0, 0, 0, 0)
    export, table = job.export, job.budget.latency_table
    layer = _kept_layer(checkpoint, kept, export)
    parameters = sum(math.prod(shape) for shape, _ in layer.values())
    matrices = sum(math.prod(shape) for shape, _ in layer.values() if len(shape) == 2)
    keys = unit_groups(checkpoint.config)[0].producers[1]
    key_bytes = _element_bytes(checkpoint.layer_tensors(0)[f"{keys.module}.weight"], export)
    milliseconds = load_latency(table).layer(kept) if table else 0.0
    return Footprint(
        parameters,
        parameters,
        _num_bytes(layer),
        2 * matrices,
        2 * kept["heads"] * keys.rows * key_bytes,
        milliseconds,
    )


Sizes = dict[str, tuple[tuple[int, ...], int]]
"""Shape and bytes per element, by tensor."""


def _num_bytes(tensors: Sizes) -> int:
    return sum(math.prod(shape) * size for shape, size in tensors.values())


def _element_bytes(info: TensorInfo, export: ExportSpec) -> int:
    return PLANNED_BYTES[info.dtype if export.dtype == "auto" else DTYPES[export.dtype]]


def _kept_layer(checkpoint: Checkpoint, kept: Mapping[str, int], export: ExportSpec) -> Sizes:
    """A layer's tensors as they will be written."""
    infos = checkpoint.layer_tensors(0)
    shapes = {name: info.shape for name, info in infos.items()}
    for group in unit_groups(checkpoint.config):
        if kept[group.name] == 0:
            shapes = {name: shape for name, shape in shapes.items() if not group.holds(name)}
            continue
        for producer in group.producers:
            for name in {f"{producer.module}.weight", f"{producer.module}.bias"} & shapes.keys():
                shapes[name] = (producer.rows * kept[group.name], *shapes[name][1:])
        shapes[f"{group.consumer}.weight"] = (
            shapes[f"{group.consumer}.weight"][0],
            group.columns * kept[group.name],
        )
    sizes = {name: (shape, _element_bytes(infos[name], export)) for name, shape in shapes.items()}
    if needs_output_bias(checkpoint.config, kept, export.target):
        (outputs, _), size = sizes["self_attn.o_proj.weight"]
        sizes["self_attn.o_proj.bias"] = ((outputs,), size)
    return sizes


def limits(budget: BudgetSpec, dense_decoder_parameters: int) -> dict[str, float]:
    """The most of a footprint that the budget allows, by field of `Footprint`."""
    asked = {
        "decoder_parameters": (
            budget.sparsity and (1 - budget.sparsity) * dense_decoder_parameters + 1e-6
        ),
        "parameters": budget.parameters,
        "weight_bytes": budget.weight_bytes,
        "flops_per_token": budget.flops_per_token,
        "kv_bytes_per_token": budget.kv_bytes_per_token,
        "latency_ms": budget.latency_ms,
    }
    return {name: limit for name, limit in asked.items() if limit is not None}


def exceeded(size: Footprint, allowed: Mapping[str, float]) -> list[str]:
    """What to change, for everything that a footprint takes more of than is allowed."""
    over = {
        name: getattr(size, name) for name, limit in allowed.items() if getattr(size, name) > limit
    }
    changes = {
        name: "lower budget.sparsity" if name == "decoder_parameters" else f"raise budget.{name}"
        for name in over
    }
    return [
        f"{changes[name]} ({name.replace('_', ' ')}: {value:,} of {allowed[name]:,.0f})"
        for name, value in over.items()
    ]
