"""What a worker keeps and where: the first of the ways to use memory that fits, what it takes, or
what would have to change.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rayprune.orchestrator.planning.worker_memory import (
    Kinds,
    gib,
    host_bytes,
    memory_by_step,
    peak_bytes,
    total,
)
from rayprune.orchestrator.planning.workload import Workload, tokens_per_neuron
from rayprune.specs.calibration import FEW_TOKENS
from rayprune.specs.errors import ResourceError
from rayprune.specs.memory import MemoryPlan

FREE_BYTES = 256 * 2**20
"""Of freed memory so much at most stays with a worker: more than a step of small models frees, for
which the system would zero its pages again at each step; a tenth of their time.
"""
SHORT = 0.15
"""Plans have been short of what was measured by as much (docs/plan.md)."""


def choices(load: Workload) -> Iterator[MemoryPlan]:
    """Ways to use memory, the fastest first; of chunks, the longest first, each with activations of
    a training kept first, where the job leaves it open. A GPU does not compute on statistics in
    files.
    """
    kept = MemoryPlan()
    without_inputs = replace(kept, keep_inputs=False)
    hidden_in_files = replace(without_inputs, spill_hidden=True)
    by_phase = {
        "pruned": (kept, without_inputs, hidden_in_files),
        "dense": (kept,),
        "refit": (kept, without_inputs, hidden_in_files),
    }
    in_memory = by_phase[load.propagation]
    in_chunks = load.propagation != "pruned" or (load.survey_levels and not load.experts)
    chunks = range(load.layers_per_worker if in_chunks else 1, 0, -1)
    in_files = () if load.on_gpu else (replace(in_memory[-1], spill_statistics=True),)
    is_open = any(training.keeps_activations is None for training in load.trainings)
    keeping = (True, False) if is_open else (False,)
    for choice in (*in_memory, *in_files):
        for count in chunks:
            chunked = replace(choice, layers_per_chunk=count)
            yield from (replace(chunked, keep_activations=keep) for keep in keeping)


def fitting(load: Workload, limit_bytes: int | None) -> MemoryPlan | None:
    """The first choice whose peak is within the limit; None: there is none. Without a limit the
    fastest, but that activations of a training, which may be many times the model, are not kept.
    """
    if limit_bytes is None:
        return replace(next(choices(load)), keep_activations=False)
    fit = (choice for choice in choices(load) if peak_bytes(load, choice) <= limit_bytes)
    return next(fit, None)


def choose_memory(
    load: Workload, limit_bytes: int | None, limit_name: str = "memory.worker"
) -> MemoryPlan:
    """The first choice that fits, with as much of freed memory left to workers as there is room for
    (a GPU's limit is not that of the worker's process).

    Raises:
        ResourceError: none does; it names what is needed, what there is, and what to change.
    """
    if choice := fitting(load, limit_bytes):
        room = FREE_BYTES
        if limit_bytes is not None and not load.on_gpu:
            likely = int((1 + SHORT) * peak_bytes(load, choice))
            room = min(room, max(0, limit_bytes - likely))
        return replace(choice, free_bytes=room)
    assert limit_bytes is not None
    grow = (
        "raise memory.worker"
        if limit_name == "memory.worker"
        else "take machines with more memory, up"
    )
    table = memory_by_step(load, least := list(choices(load))[-1])
    step = max(table, key=lambda name: total(table[name]))
    parts = sorted(table[step].items(), key=lambda item: -item[1])[:3]
    need, largest = (
        gib(peak_bytes(load, least)),
        ", ".join(f"{name} {gib(size)}" for name, size in parts),
    )
    raise ResourceError(
        f"{limit_name}: a worker needs at least {need} (step {step}: {largest}), it may use"
        f" {gib(limit_bytes)}; {grow} to {need}{_remedies(load, limit_bytes)}"
    )


def _remedies(load: Workload, limit_bytes: int) -> str:
    """Fields that would help, by trying them."""
    found = [""]
    if workers := fewest_workers(load, limit_bytes):
        grown = (
            "set cluster.executor: ray, and parallel.workers"
            if load.in_process
            else ("raise parallel.workers")
        )
        found.append(f"{grown} to {workers}")
    if load.micro_batch > 1 and fitting(replace(load, micro_batch=1), limit_bytes):
        found.append("lower parallel.micro_batch to 1")
    if load.own_text and fitting(replace(load, own_text=None), limit_bytes):
        found.append(
            "leave calibration.own out: text that `rayprune generate` has written elsewhere may"
            " stand in calibration.mix"
        )
    if samples := _fewer_samples(load, limit_bytes):
        found.append(f"lower calibration.samples to {samples}")
    in_layers = replace(load, placement="layers", propagation="dense")
    may_be = load.propagation == "pruned" and load.experts is None and load.masks is None
    if may_be and fitting(in_layers, limit_bytes):
        found.append("set parallel.placement: layers")
    return ", or ".join(found)


def _fewer_samples(load: Workload, limit_bytes: int) -> int | None:
    """How many windows would fit that are still enough tokens."""
    for count in (load.samples >> shift for shift in range(1, load.samples.bit_length())):
        fewer = replace(load, samples=count)
        if count < load.shards or tokens_per_neuron(fewer) < FEW_TOKENS:
            return None
        if fitting(fewer, limit_bytes):
            return count
    return None


def fewest_workers(load: Workload, limit_bytes: int, keep_all: bool = False) -> int | None:
    """The smallest number of workers with which the job fits, on Ray; with `keep_all`, with nothing
    recomputed or in files and in one wave.
    """
    bound = load.shards if load.placement == "shards" else load.num_layers

    def fits(workers: int) -> bool:
        attempt = replace(load, workers=workers, in_process=False)
        return (
            peak_bytes(attempt, next(choices(attempt))) <= limit_bytes
            if keep_all
            else fitting(attempt, limit_bytes) is not None
        )

    return next((workers for workers in range(1, bound + 1) if fits(workers)), None)


@dataclass(frozen=True)
class MemoryNeeds:
    """What workers need with one choice, beside what each may use and how few of them would do."""

    memory_limit_bytes: int | None
    memory_by_step: dict[str, Kinds]
    worker_memory_bytes: int
    host_memory_bytes: int
    fewest_workers: int | None
    fewest_workers_keeping_all: int | None


def memory_needs(load: Workload, choice: MemoryPlan, limit_bytes: int | None) -> MemoryNeeds:
    """The needs of a choice; without a limit any number of workers would do, and none is named."""
    return MemoryNeeds(
        memory_limit_bytes=limit_bytes,
        memory_by_step=memory_by_step(load, choice),
        worker_memory_bytes=peak_bytes(load, choice),
        host_memory_bytes=host_bytes(load),
        fewest_workers=fewest_workers(load, limit_bytes) if limit_bytes else None,
        fewest_workers_keeping_all=(
            fewest_workers(load, limit_bytes, keep_all=True) if limit_bytes else None
        ),
    )
