"""How long a sweep takes on a machine: for each stage the largest of arithmetic, memory, disk and
network time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rayprune.orchestrator.planning.costs import (
    gradient_states_bytes,
    layer_costs,
    over_layers,
    phase_costs,
    spilled_hidden_bytes,
    spilled_statistics_bytes,
)
from rayprune.orchestrator.planning.messages import message_path_bytes
from rayprune.orchestrator.planning.training_time import (
    named,
    teacher_flops,
    teacher_seconds,
    training_flops,
    training_seconds,
)
from rayprune.orchestrator.planning.workload import (
    CANDIDATES_AT_ONCE,
    GRADIENT_WINDOWS_AT_ONCE,
    Workload,
    in_rows,
    num_chunks,
)
from rayprune.specs.machine import MachineProfile
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.blocks import PANEL, PRODUCT_TOKENS, TOLD_AT_ONCE
from rayprune.workers.store.layout import TEACHER_TASK

GRAM_RATE = 0.55
"""Of the rate of the forward passes: that of products for a Gram matrix on tensor cores, counted as
half of the full product (276 of 494 TFLOP/s on an H100).
"""
SOLVING_RATE = 0.6
"""Of the rate of fp64 products on a GPU: that of factors and solutions (28 of 47 TFLOP/s there)."""
BATCH_SECONDS = 2e-3
"""A micro-batch and a layer on a GPU, by the launches that Python makes."""
PIVOT_SECONDS = 1.1e-5
"""One pivot on a GPU, where it is a launch that waits for the one before (measured on an H100)."""
Bounds = dict[str, float]
"""Seconds by what takes them."""
WORK = ("forward", "statistics", "selection", "correction")
"""Stages that have arithmetic."""
STAGES = (*WORK, "messages", "files", "write")


@dataclass(frozen=True)
class Stage:
    """One kind of work of a sweep: its arithmetic over the cluster, and what bounds it on the
    critical path.
    """

    name: str
    flops: int
    seconds: float | None = None
    bound_by: str = ""


def stages(load: Workload, choice: MemoryPlan, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """Arithmetic by stage, and with a profile its seconds: the largest of arithmetic, memory, disk
    and network time.

    Stages of a layer follow one another, but with `shards` a layer is written while the next one is
    worked on. `shards`: forward passes and statistics are split over the workers; a decision, of
    which they share the solving alone, counts as one's. `layers`: every worker does all of it for
    its own layers, after the first micro-batch has reached it. `refit` is one after the other.
    """
    costs = layer_costs(load, choice)
    flops = {name: over_layers(costs, f"{name}_flops") for name in WORK}
    if machine is None:
        return (
            *(Stage(name, flops[name]) for name in WORK),
            *_own_text_stage(load, None),
            *_gradients_stage(load, None),
            *_divergence_stage(load, None),
            *_gate_stage(load, None),
            *_training_stages(load, choice, None),
        )
    phases = [_bounds(phase, choice, machine) for phase in load.phases().values()]
    timed = [
        _timed(name, flops.get(name, 0), [bounds[name] for bounds in phases]) for name in STAGES
    ]
    if load.placement == "shards" and load.masks is None:
        timed[-1] = _beside(timed[:-1], timed[-1], load.num_layers)
    return (
        *timed,
        *_own_text_stage(load, machine),
        *_gradients_stage(load, machine),
        *_divergence_stage(load, machine),
        *_gate_stage(load, machine),
        *_training_stages(load, choice, machine),
        *_evaluation_stage(load, machine),
    )


def _beside(others: Sequence[Stage], write: Stage, num_layers: int) -> Stage:
    """Writing as far as it is not done while the next layer is worked on: the last layer, or what
    it takes longer.
    """
    write_seconds, rest = write.seconds or 0.0, sum(stage.seconds or 0.0 for stage in others)
    longer = write_seconds - rest * (num_layers - 1) / num_layers
    return replace(write, seconds=max(write_seconds / num_layers, longer))


def _timed(name: str, flops: int, phases: list[Bounds]) -> Stage:
    """A stage over all phases; it is bound by what bounds the longest of them."""
    slowest = [max(bounds, key=lambda key: bounds[key]) for bounds in phases]
    seconds = [bounds[key] for bounds, key in zip(phases, slowest, strict=True)]
    return Stage(name, flops, sum(seconds), slowest[seconds.index(max(seconds))])


def _bounds(load: Workload, choice: MemoryPlan, machine: MachineProfile) -> dict[str, Bounds]:
    """Seconds on the critical path of one phase, by stage and by what takes them."""
    work = partial(over_layers, phase_costs(load, choice))
    spread, deciders = _parallel(load)
    slower = 1 / SOLVING_RATE - 1 if load.on_gpu else 0.0
    batches = math.ceil(load.tokens / load.batch_tokens)
    readers = load.workers if load.placement == "shards" else deciders
    spilled = (
        spilled_statistics_bytes(load, choice) / deciders
        + spilled_hidden_bytes(load, choice) / spread
    )
    return {
        "forward": {
            "arithmetic": (
                work("forward_flops")
                / spread
                / machine.forward_flops
                * _filling(load, batches, choice)
            ),
            "memory": (
                batches
                * work("parameters")
                * load.element_bytes
                / spread
                / machine.memory_bandwidth
            ),
            "disk": work("read_bytes") / readers / machine.disk_bandwidth,
            "launches": load.on_gpu * batches * load.num_layers * BATCH_SECONDS / spread,
        },
        "statistics": {
            "arithmetic": work("statistics_flops") / spread / _statistics_rate(load, machine),
            "memory": _gram_traffic(load) / spread / machine.memory_bandwidth,
        },
        "selection": {
            "arithmetic": work("selection_flops") / deciders / machine.fp64_flops,
            "memory": work("selection_flops") * 8 / PANEL / deciders / machine.memory_bandwidth,
            "launches": _num_pivots(load) * PIVOT_SECONDS / deciders,
        },
        "correction": {
            "arithmetic": (
                (work("correction_flops") + slower * work("solving_flops"))
                / deciders
                / machine.fp64_flops
            )
        },
        "messages": {
            "network": message_path_bytes(load, work("message_bytes")) / machine.network_bandwidth
        },
        "files": {"disk": spilled / machine.disk_bandwidth},
        "write": {"disk": work("written_bytes") / deciders / machine.disk_bandwidth},
    }


def _parallel(load: Workload) -> tuple[float, float]:
    """Workers that share the tokens, and workers that decide at the same time, unevenness taken
    off.
    """
    if load.placement == "shards":
        return load.tokens / load.share_tokens, 1.0
    return load.num_layers / load.layers_per_worker, load.num_layers / load.layers_per_worker


def _filling(load: Workload, batches: int, choice: MemoryPlan) -> float:
    """Placement `layers`: a wave takes as many steps as there are micro-batches, and one less than
    workers to fill.
    """
    workers = min(load.workers, num_chunks(load, choice))
    return (batches + workers - 1) / batches if load.placement == "layers" else 1.0


def _on_tensor_cores(load: Workload) -> bool:
    """Whether products for Gram matrices are computed there: without drift, whose own are not."""
    return load.on_gpu and load.element_bytes == 2 and not load.corrects_drift


def _statistics_rate(load: Workload, machine: MachineProfile) -> float:
    return machine.forward_flops * GRAM_RATE if _on_tensor_cores(load) else machine.fp32_flops


def _gram_traffic(load: Workload) -> int:
    """Memory traffic of adding all products to the Gram matrices of all layers: half of fp64 read
    and written, and fp32 twice where the product is formed first.
    """
    groups = [
        (kind, group)
        for kind in load.kinds
        for group in load.decided(kind)
        if not in_rows(load, group)
    ]
    size = sum(kind.num_layers * load.blocks(group) * group.width**2 for kind, group in groups)
    if _on_tensor_cores(load):
        return math.ceil(load.tokens / load.batch_tokens) * size * 8
    return math.ceil(load.tokens / min(load.batch_tokens, PRODUCT_TOKENS)) * size * 12


def _num_pivots(load: Workload) -> int:
    """Columns that a GPU picks one after the other."""
    if not (load.on_gpu and load.selects and load.ranking.name == "stat"):
        return 0
    return sum(
        kind.num_layers * load.blocks(group) * load.columns(group)
        for kind in load.kinds
        for group in load.pruned(kind)
    )


def _own_text_stage(load: Workload, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """Token by token through the whole model, each reading all weights and half of the cache that
    there is in the end; workers write a batch at the same time.
    """
    if (own := load.own_text) is None:
        return ()
    flops = own.tokens * 2 * (load.active_parameters + load.vocabulary * load.hidden)
    if machine is None:
        return (Stage("own text", flops),)
    steps = [own.batches[n : n + load.workers] for n in range(0, len(own.batches), load.workers)]
    longest = sum(max(length for _, length in wave) for wave in steps)
    layers = sum(kind.num_layers * kind.parameters for kind in load.kinds)
    read_bytes = (layers + load.vocabulary * load.hidden) * own.element_bytes
    bounds = {
        "arithmetic": flops * len(steps) / len(own.batches) / machine.forward_flops,
        "memory": longest
        * (read_bytes + own.most_cached * own.cached_bytes / 2)
        / machine.memory_bandwidth,
        "disk": load.bytes_on_disk / machine.disk_bandwidth,
        "launches": load.on_gpu * longest * load.num_layers * BATCH_SECONDS,
    }
    return (_timed("own text", flops, [bounds]),)


def _gradients_stage(load: Workload, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """Up through all layers, and down again with gradients of activations alone: three forward
    passes.
    """
    if not load.gradient_windows:
        return ()
    flops = (
        3
        * load.gradient_windows
        * load.sequence_length
        * 2
        * (load.active_parameters + load.vocabulary * load.hidden)
    )
    if machine is None:
        return (Stage("gradients", flops),)
    rounds = math.ceil(math.ceil(load.gradient_windows / load.workers) / GRADIENT_WINDOWS_AT_ONCE)
    bounds = {
        "arithmetic": flops / min(load.workers, load.gradient_windows) / machine.forward_flops,
        "disk": (
            (2 * rounds * load.bytes_on_disk + gradient_states_bytes(load)) / machine.disk_bandwidth
        ),
    }
    return (_timed("gradients", flops, [bounds]),)


def _divergence_stage(load: Workload, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """Candidates for the allocation of the budget: each shares half of its layers with another,
    none its scores.
    """
    if not load.candidates:
        return ()
    tokens = load.candidate_windows * load.sequence_length
    flops = (
        load.candidates * tokens * 2 * (load.active_parameters // 2 + load.vocabulary * load.hidden)
    )
    if machine is None:
        return (Stage("divergence", flops),)
    passes = math.ceil(load.candidates / CANDIDATES_AT_ONCE)
    bounds = {
        "arithmetic": flops / min(load.workers, load.candidate_windows) / machine.forward_flops,
        "disk": passes * load.bytes_on_disk / machine.disk_bandwidth,
    }
    return (_timed("divergence", flops, [bounds]),)


def _gate_stage(load: Workload, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """The original and the pruned model, each counted as what is pruned."""
    if not load.gate_windows:
        return ()
    tokens = load.gate_windows * load.sequence_length
    flops = 2 * tokens * 2 * (load.active_parameters + load.vocabulary * load.hidden)
    if machine is None:
        return (Stage("gate", flops),)
    bounds = {
        "arithmetic": flops / min(load.workers, load.gate_windows) / machine.forward_flops,
        "disk": (load.bytes_on_disk + load.output_bytes) / machine.disk_bandwidth,
    }
    return (_timed("gate", flops, [bounds]),)


def _training_stages(
    load: Workload, choice: MemoryPlan, machine: MachineProfile | None
) -> Iterator[Stage]:
    """Trainings, and what a teacher is asked for them."""
    for name, training in named(load):
        asks = name == TEACHER_TASK
        flops = teacher_flops(load, training) if asks else training_flops(load, training, choice)
        if machine is None:
            yield Stage(name, flops)
            continue
        seconds = (
            teacher_seconds(load, training, machine)
            if asks
            else training_seconds(load, training, choice, machine)
        )
        yield _timed(name, flops, [seconds])


def _evaluation_stage(load: Workload, machine: MachineProfile) -> tuple[Stage, ...]:
    """Passes over the dense and the pruned model, each counted as dense."""
    if not load.evaluation_tokens:
        return ()
    numbers = load.active_parameters + load.vocabulary * load.hidden
    flops = load.evaluations * load.evaluation_tokens * 2 * numbers
    windows = math.ceil(load.evaluation_tokens / load.evaluation_window / load.workers)
    times = math.ceil(windows / TOLD_AT_ONCE[load.device_kind])
    bounds = {
        "arithmetic": flops / load.workers / machine.forward_flops,
        "disk": (
            times
            * (load.evaluations / 2)
            * (load.bytes_on_disk + load.output_bytes)
            / machine.disk_bandwidth
        ),
    }
    return (_timed("evaluate", flops, [bounds]),)
