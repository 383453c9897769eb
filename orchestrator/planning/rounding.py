"""In which steps units stay, so that engines compute fast with what is left.

Kernels work in tiles: llama.cpp's K-quants take rows of 256 numbers, its other types rows of 32,
GPUs tiles of 64 to 256. A width that is no multiple falls back to something slower or larger
(docs/engines.md).
"""

from math import gcd, lcm

from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.description import Group, Model

AUTO = ((10_240, 256), (1_024, 64), (1, 32))
"""FFN channels from which on `round_to: auto` is so many: a step is at most 2.5% of the first,
and 6.25% of the second."""
_TOLD = 0.0025
"""From so much more of the decoder than was asked for on, a plan says why."""


def asked_units(job: JobSpec, model: Model) -> dict[str, int]:
    """By group, how many units stay in every layer because the job says so."""
    budget, asked = job.budget, dict[str, int]()
    if budget.experts:
        asked |= dict.fromkeys(model.names_of("experts"), budget.experts)
    if budget.kv_groups != "auto":
        asked |= dict.fromkeys(model.names_of("attention"), budget.kv_groups)
    return asked


def unit_steps(job: JobSpec, model: Model) -> dict[str, int]:
    """By group, of what the number of units that stay is a multiple, where not all of them do.

    An FFN's channels: `budget.round_to` on each GPU of `export.tensor_parallel`. Experts: one of
    every part of them that the router chooses among. KV groups: what
    makes their consumer's inputs a multiple of the same with `auto`, as far as they were before,
    and gives every GPU as many; all stay where the GPUs share some.

    Raises:
        SpecError: the model cannot be split over so many GPUs.
    """
    gpus = job.export.tensor_parallel
    widest = max(group.num_units for group in model.groups if group.kind == "ffn")
    steps = {}
    for group in model.groups:
        if group.kind == "ffn":
            steps[group.name] = lcm(_channels(job, group.num_units) * gpus, group.multiple)
        elif group.kind == "experts":
            steps[group.name] = group.parts
        else:
            wanted = _channels(job, widest) if job.budget.round_to == "auto" else 1
            steps[group.name] = _kv_groups(group, wanted * gpus, gpus)
    return steps


def told_of_sizes(job: JobSpec, checkpoint: Checkpoint, stays: int) -> str | None:
    """Why a shape of which so many of the decoder's parameters stay is not what `budget.sparsity`
    asks for.
    """
    asked, removed = job.budget.sparsity, 1 - stays / checkpoint.decoder_parameters
    if asked is None:
        return None
    if job.budget.per_layer:
        return (
            f"every layer keeps what suits it, together {1 - asked:.2%} of the decoder to a step of"
            " one layer; above is the mean layer, by which memory and work are planned"
        )
    if removed - asked < _TOLD:
        return None
    steps = unit_steps(job, checkpoint.model)
    widths = ", ".join(
        f"{group.title} come in multiples of {steps[group.name]}"
        for group in checkpoint.model.groups
        if group.kind == "ffn" and steps[group.name] > 1
    )
    return (
        f"more than the {asked:.2%} asked for: {widths} (a smaller budget.round_to comes nearer)"
        if widths
        else None
    )


def channel_steps(job: JobSpec, model: Model) -> dict[str, int]:
    """By FFN, what is a step of all in one layer with it, which keep the same fraction; those that
    follow another are left out.
    """
    steps, found = unit_steps(job, model), dict[str, int]()
    for layer, _ in model.alike:
        names = [g.name for g in layer.groups if g.kind == "ffn" and not g.times]
        together = lcm(*(steps[name] for name in names))
        found |= {name: lcm(found.get(name, 1), together) for name in names}
    return found


def _channels(job: JobSpec, width: int) -> int:
    if job.budget.round_to != "auto":
        return job.budget.round_to
    return next(step for least, step in AUTO if width >= least)


def _kv_groups(group: Group, wanted: int, gpus: int) -> int:
    aligned = gcd(wanted, group.width)
    step = aligned // gcd(aligned, group.columns)
    if group.num_units % gpus == 0:
        return lcm(step, gpus)
    head_size = group.cached // 2 or group.columns
    if gpus % group.num_units == 0 and group.width // head_size % gpus == 0:
        return group.num_units
    raise SpecError(
        f"export.tensor_parallel: {group.num_units} {group.title} with"
        f" {group.width // head_size} query heads cannot be split over {gpus} GPUs; take a number"
        " that divides the KV groups"
    )
