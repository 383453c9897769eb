"""What a sweep costs: memory of a worker by step, arithmetic, messages, disk, time. Pure numbers; docs/plan.md lists the formulas.

Letters: T tokens, t tokens of a micro-batch, D hidden, F width of a consumer's input, K kept columns, N workers, L layers,
e bytes per element of the forward type, w bytes per element on disk, n tokens that reach one block of a group.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from specs.errors import ResourceError
from specs.machine import MachineProfile
from specs.memory import MemoryPlan
from workers.shapes import CoupledGroup, LayerKind
from workers.shards import even_parts, owned_nodes, roots

Placement = Literal["shards", "layers"]
Propagation = Literal["pruned", "dense", "refit"]
Kinds = dict[str, int]
"""Bytes by kind."""

RUNTIME_BYTES = 700 * 2**20
"""Private memory of a worker that has imported torch and transformers and done nothing, measured on Linux x86-64."""
CONVERSION_BYTES = 64 * 2**20
"""CPU: the block in which weights are converted from the mapped file."""
BLOCK_BYTES = 256 * 2**20
"""At most so much of one block of output rows in a correction; three are held."""
WINDOW = 4
"""Placement `layers`: micro-batches in flight at one worker."""
ACTIVATIONS = 4
"""Tensors of a consumer's width that a forward pass holds at once: gate, up, their product, one temporary."""
PANEL = 64
"""Columns that pivoting takes before it updates the matrix: what its memory traffic is divided by."""
FORWARD_PASSES: Mapping[str, int] = {"pruned": 1, "dense": 1, "refit": 2}
"""Forward passes of a sweep: `refit` walks the dense and the pruned path."""


@dataclass(frozen=True)
class Workload:
    """Everything the formulas need to know of a job and its model."""

    kinds: tuple[LayerKind, ...]
    kept: Mapping[str, int]
    """Units that stay, for the groups that lose some."""
    hidden: int
    vocabulary: int
    outer_parameters: int
    bytes_on_disk: int
    output_bytes: int
    samples: int
    sequence_length: int
    shards: int
    held_out_shards: int
    micro_batch: int
    workers: int
    on_gpu: bool
    element_bytes: int
    written_element_bytes: int
    num_candidates: int
    checkpoint_layers: int
    evaluation_tokens: int
    evaluation_window: int
    placement: Placement = "shards"
    propagation: Propagation = "pruned"

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(kind.num_layers for kind in self.kinds)

    @property
    def tokens(self) -> int:
        """T."""
        return self.samples * self.sequence_length

    @property
    def batch_tokens(self) -> int:
        """t."""
        return min(self.micro_batch, self.samples) * self.sequence_length

    @property
    def share_tokens(self) -> int:
        """Tokens of the worker with the most, placement `shards`."""
        return math.ceil(self.shards / self.workers) * math.ceil(self.samples / self.shards) * self.sequence_length

    @property
    def layers_per_worker(self) -> int:
        """Layers of the worker with the most, placement `layers`."""
        return math.ceil(self.num_layers / self.workers)

    def pruned(self, kind: LayerKind) -> list[CoupledGroup]:
        """Groups of a layer that lose units."""
        return [group for group in kind.groups if group.name in self.kept]

    def columns(self, group: CoupledGroup) -> int:
        """K: columns of a consumer's input that stay."""
        return self.kept.get(group.name, group.num_units) * group.columns

    def kept_parameters(self, kind: LayerKind) -> int:
        """Parameters of a layer that stay."""
        lost = [(group.num_units - self.kept[group.name]) * group.count * group.unit_parameters for group in self.pruned(kind)]
        return kind.parameters - sum(lost)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        return max(kind.parameters for kind in self.kinds)

    @cached_property
    def active_width(self) -> int:
        """Numbers of the widest consumer input that one token has, over the blocks it passes through."""
        return max(group.active * group.width for kind in self.kinds for group in kind.groups)


def block_tokens(load: Workload, group: CoupledGroup) -> int:
    """n: tokens that reach one block of a group, routing taken as even."""
    return math.ceil(load.tokens * group.active / group.count)


def in_rows(load: Workload, group: CoupledGroup) -> bool:
    """Whether fewer tokens than columns reach a consumer: then the rows themselves are kept instead of a Gram matrix."""
    return block_tokens(load, group) < group.width


def gram_bytes(group: CoupledGroup) -> int:
    """One Gram matrix for every block: count F^2 8."""
    return group.count * group.width**2 * 8


def statistics_bytes(load: Workload, group: CoupledGroup) -> int:
    """Training and held-out statistic of a group: two Gram matrices for every block, or its rows once."""
    if in_rows(load, group):
        return group.count * block_tokens(load, group) * group.width * load.element_bytes
    return 2 * gram_bytes(group)


def partial_bytes(load: Workload, group: CoupledGroup) -> int:
    """Statistics of one worker while it collects its shards: a sum for every level of their merge tree, or its share of the rows."""
    if in_rows(load, group):
        return math.ceil(statistics_bytes(load, group) * load.share_tokens / load.tokens)
    return gram_bytes(group) * (1 + math.ceil(math.log2(math.ceil(load.shards / load.workers))))


def factorisation_bytes(load: Workload, group: CoupledGroup) -> int:
    """One decision: the scaled copy for pivoting, then the kept parts, their factor and blocks of output rows; and the result."""
    kept, blocks = load.columns(group), 3 * min(BLOCK_BYTES, 8 * load.hidden * load.columns(group))
    result = load.hidden * kept * load.written_element_bytes
    if in_rows(load, group):
        tokens = block_tokens(load, group)
        return max(8 * tokens * group.width, 2 * 8 * tokens * kept + blocks) + result
    return max(8 * group.width**2, 3 * 8 * kept**2 + blocks) + result


def memory_by_step(load: Workload, choice: MemoryPlan) -> dict[str, Kinds]:
    """Bytes a worker needs, by step and by kind; of layers and groups that differ, those that need most."""
    steps: dict[str, list[Kinds]] = {"collect": [], "decide": [], "write": []}
    standing = _standing(load, choice)
    for kind in load.kinds:
        for group in load.pruned(kind):
            steps["collect"].append(standing | _activations(load) | {"statistics": _collected(load, choice, kind, group)})
            held = {"statistics": _decided(load, choice, kind, group), "factorisation": factorisation_bytes(load, group)}
            steps["decide"].append(standing | held)
        output = {} if load.on_gpu else {"output": 2 * _written_layer_bytes(load, kind)}
        steps["write"].append(standing | _left_while_writing(load, choice) | output)
    table = {step: max(rows, key=total) for step, rows in steps.items() if rows}
    if load.evaluation_tokens:
        table["evaluate"] = _evaluation(load)
    return table if load.on_gpu else table | {"load check": {"runtime": RUNTIME_BYTES, "output": load.output_bytes}}


def host_bytes(load: Workload) -> int:
    """Memory of the machine that a GPU worker needs: two copies of a layer while it writes, the whole pruned model while it is checked."""
    layer = 2 * max(_written_layer_bytes(load, kind) for kind in load.kinds)
    return RUNTIME_BYTES + max(layer, load.output_bytes) if load.on_gpu else 0


def total(kinds: Kinds) -> int:
    """Bytes of all kinds together."""
    return sum(kinds.values())


def peak_bytes(load: Workload, choice: MemoryPlan) -> int:
    """The most a worker needs at once."""
    return max(map(total, memory_by_step(load, choice).values()))


def _standing(load: Workload, choice: MemoryPlan) -> Kinds:
    """What is held through all of a layer's steps."""
    weights = _weights_bytes(load, choice.layers_per_chunk)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": weights,
        "hidden states": _hidden_bytes(load, choice),
        "inputs": _inputs_bytes(load, choice),
    }


def _weights_bytes(load: Workload, layers_per_chunk: int) -> int:
    """GPU: embeddings and head, and the layer with its successor, or the chunk. CPU: mapped from the file, but for one block."""
    if not load.on_gpu:
        return CONVERSION_BYTES
    layers = 2 if load.placement == "shards" else layers_per_chunk
    return (load.outer_parameters + layers * load.layer_parameters) * load.element_bytes


def _hidden_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states, and attention outputs of the same size: the share, the window in flight, or in a file but for a micro-batch."""
    if load.placement == "layers":
        return WINDOW * load.batch_tokens * load.hidden * load.element_bytes
    return 2 * (load.batch_tokens if choice.spill_hidden else load.share_tokens) * load.hidden * load.element_bytes


def _inputs_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Z of the widest group for the whole share, where it is kept; a micro-batch's is among the activations."""
    if load.placement == "layers" or not choice.keep_inputs:
        return 0
    return load.share_tokens * load.active_width * load.element_bytes


def _activations(load: Workload) -> Kinds:
    return {"activations": ACTIVATIONS * load.batch_tokens * load.active_width * load.element_bytes}


def _collected(load: Workload, choice: MemoryPlan, kind: LayerKind, group: CoupledGroup) -> int:
    if choice.spill_statistics:
        return _spilled(load, group)
    return partial_bytes(load, group) if load.placement == "shards" else _chunk_statistics(load, choice, kind)


def _decided(load: Workload, choice: MemoryPlan, kind: LayerKind, group: CoupledGroup) -> int:
    if choice.spill_statistics:
        return 0  # read block by block into the factorisation's own matrices
    return statistics_bytes(load, group) if load.placement == "shards" else _chunk_statistics(load, choice, kind)


def _spilled(load: Workload, group: CoupledGroup) -> int:
    """Statistics in files while they grow: a GPU holds one block's; pages of a file are no private memory of a process on the CPU."""
    return math.ceil(statistics_bytes(load, group) / 2 / group.count) if load.on_gpu else 0


def _chunk_statistics(load: Workload, choice: MemoryPlan, kind: LayerKind) -> int:
    """Statistics of all groups of all layers of a chunk."""
    return choice.layers_per_chunk * sum(statistics_bytes(load, group) for group in load.pruned(kind))


def _left_while_writing(load: Workload, choice: MemoryPlan) -> Kinds:
    """Placement `layers`: the statistics of the chunk's other layers are still there."""
    if load.placement == "shards" or choice.spill_statistics:
        return {}
    return {"statistics": max(_chunk_statistics(load, choice, kind) for kind in load.kinds)}


def _written_layer_bytes(load: Workload, kind: LayerKind) -> int:
    return load.kept_parameters(kind) * load.written_element_bytes


def _evaluation(load: Workload) -> Kinds:
    """Hidden states of a worker's windows, and the scores of one window: as computed, in fp32, and their logarithms."""
    share = math.ceil(load.evaluation_tokens / load.evaluation_window / load.workers) * load.evaluation_window
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(load, 1),
        "hidden states": share * load.hidden * load.element_bytes,
        "activations": load.evaluation_window
        * max(load.vocabulary * (load.element_bytes + 8), ACTIVATIONS * load.active_width * load.element_bytes),
    }


def choices(load: Workload) -> Iterator[MemoryPlan]:
    """Ways to use memory, the fastest first."""
    if load.placement == "shards":
        yield MemoryPlan()
        yield MemoryPlan(keep_inputs=False)
        yield MemoryPlan(keep_inputs=False, spill_hidden=True)
        yield MemoryPlan(keep_inputs=False, spill_hidden=True, spill_statistics=True)
        return
    for spill in (False, True):
        yield from (MemoryPlan(spill_statistics=spill, layers_per_chunk=count) for count in range(load.layers_per_worker, 0, -1))


def fitting(load: Workload, limit_bytes: int | None) -> MemoryPlan | None:
    """The first choice whose peak is within the limit; None: there is none."""
    return next((choice for choice in choices(load) if limit_bytes is None or peak_bytes(load, choice) <= limit_bytes), None)


def choose_memory(load: Workload, limit_bytes: int | None, limit_name: str = "memory.worker") -> MemoryPlan:
    """The first choice that fits.

    Raises:
        ResourceError: none does; it names what is needed, what there is, and what to change.
    """
    if choice := fitting(load, limit_bytes):
        return choice
    assert limit_bytes is not None
    table = memory_by_step(load, least := list(choices(load))[-1])
    step = max(table, key=lambda name: total(table[name]))
    parts = sorted(table[step].items(), key=lambda item: -item[1])[:3]
    raise ResourceError(
        f"{limit_name}: a worker needs at least {gib(peak_bytes(load, least))} (step {step}: "
        f"{', '.join(f'{name} {gib(size)}' for name, size in parts)}), it may use {gib(limit_bytes)}; {_remedies(load, limit_bytes, least)}"
    )


def _remedies(load: Workload, limit_bytes: int, least: MemoryPlan) -> str:
    """Fields that would help, by trying them."""
    found = [f"raise memory.worker to {gib(peak_bytes(load, least))}"]
    if workers := fewest_workers(load, limit_bytes):
        found.append(f"raise parallel.workers to {workers}")
    if load.micro_batch > 1 and fitting(replace(load, micro_batch=1), limit_bytes):
        found.append("lower parallel.micro_batch to 1")
    if samples := _fewer_samples(load, limit_bytes):
        found.append(f"lower calibration.samples to {samples}")
    if load.placement == "shards" and fitting(replace(load, placement="layers"), limit_bytes):
        found.append("set parallel.placement: layers")
    return ", or ".join(found)


def _fewer_samples(load: Workload, limit_bytes: int) -> int | None:
    fewer = [load.samples >> shift for shift in range(1, load.samples.bit_length())]
    return next((count for count in fewer if count >= load.shards and fitting(replace(load, samples=count), limit_bytes)), None)


def fewest_workers(load: Workload, limit_bytes: int, keep_all: bool = False) -> int | None:
    """The smallest number of workers with which the job fits; with `keep_all`, with nothing recomputed or in files."""
    bound = load.shards if load.placement == "shards" else load.num_layers

    def fits(workers: int) -> bool:
        attempt = replace(load, workers=workers)
        return peak_bytes(attempt, next(choices(attempt))) <= limit_bytes if keep_all else fitting(attempt, limit_bytes) is not None

    return next((workers for workers in range(1, bound + 1) if fits(workers)), None)


def gib(num_bytes: int) -> str:
    """Bytes in GiB, for people."""
    return f"{num_bytes / 2**30:,.2f} GiB"


@dataclass(frozen=True)
class LayerCost:
    """One layer task, summed over all workers."""

    first: int
    num_layers: int
    parameters: int
    active_parameters: int
    weight_bytes: int
    hidden_bytes: int
    input_bytes: int
    statistics_bytes: int
    factorisation_bytes: int
    forward_flops: int
    statistics_flops: int
    selection_flops: int
    correction_flops: int
    num_messages: int
    message_bytes: int
    read_bytes: int
    written_bytes: int


def layer_costs(load: Workload, choice: MemoryPlan) -> tuple[LayerCost, ...]:
    """The layer tasks, one entry for each kind of layer."""
    return tuple(_layer_cost(load, choice, kind) for kind in load.kinds)


def _layer_cost(load: Workload, choice: MemoryPlan, kind: LayerKind) -> LayerCost:
    groups = load.pruned(kind)
    messages = [_messages(load, group) for group in groups] if load.placement == "shards" else [_handover(load, choice)]
    readers = load.workers if load.placement == "shards" else 1
    return LayerCost(
        first=kind.first,
        num_layers=kind.num_layers,
        parameters=kind.parameters,
        active_parameters=kind.active_parameters,
        weight_bytes=kind.num_bytes,
        hidden_bytes=load.tokens * load.hidden * load.element_bytes,
        input_bytes=sum(load.tokens * group.active * group.width * load.element_bytes for group in groups),
        statistics_bytes=sum(statistics_bytes(load, group) for group in groups),
        factorisation_bytes=max((factorisation_bytes(load, group) for group in groups), default=0),
        forward_flops=_passes(load, choice) * forward_flops(load, kind),
        statistics_flops=sum(statistics_flops(load, group) for group in groups),
        selection_flops=sum(selection_flops(load, group) for group in groups),
        correction_flops=sum(correction_flops(load, group) for group in groups),
        num_messages=math.ceil(sum(count for count, _ in messages)),
        message_bytes=math.ceil(sum(size for _, size in messages)),
        read_bytes=readers * kind.num_bytes,
        written_bytes=_written_layer_bytes(load, kind),
    )


def _passes(load: Workload, choice: MemoryPlan) -> int:
    """Forward passes; Z that is not kept is computed a second time."""
    return FORWARD_PASSES[load.propagation] + (load.placement == "shards" and not choice.keep_inputs)


def forward_flops(load: Workload, kind: LayerKind) -> int:
    """2 T per active parameter, and T (sequence length) of causal attention for every number a query meets."""
    return load.tokens * (2 * kind.active_parameters + load.sequence_length * kind.attention_width)


def statistics_flops(load: Workload, group: CoupledGroup) -> int:
    """T F^2, half of the product, for the blocks a token passes through; rows cost nothing."""
    once = 0 if in_rows(load, group) else load.tokens * group.active * group.width**2
    return once * FORWARD_PASSES[load.propagation]


def selection_flops(load: Workload, group: CoupledGroup) -> int:
    """Pivoting: F^3/3 on a Gram matrix, 2 n F min(n, K) on rows, for every block."""
    if in_rows(load, group):
        tokens = block_tokens(load, group)
        return group.count * 2 * tokens * group.width * min(tokens, load.columns(group))
    return group.count * group.width**3 // 3


def correction_flops(load: Workload, group: CoupledGroup) -> int:
    """K^3/3 + 4 K^2 D for every candidate and the final fit; on rows 2 n^2 K for the factor and 4 n K D for each."""
    kept, fits, tokens = load.columns(group), load.num_candidates + 1, block_tokens(load, group)
    if in_rows(load, group):
        return group.count * (2 * tokens * kept * min(tokens, kept) + fits * 4 * tokens * kept * load.hidden)
    return group.count * fits * (kept**3 // 3 + 4 * kept**2 * load.hidden)


def _messages(load: Workload, group: CoupledGroup) -> tuple[float, float]:
    """Placement `shards`: tree nodes that go to the worker that decides, and the cut that goes to all others."""
    others = (load.workers - 1) / load.workers
    parts = even_parts(load.shards, load.workers)
    nodes = sum(len(owned_nodes(root, part)) for root in roots(load.shards, load.held_out_shards) for part in parts)
    size = statistics_bytes(load, group) if in_rows(load, group) else nodes * gram_bytes(group)
    cut = group.count * load.hidden * load.columns(group) * load.written_element_bytes
    return nodes * others + load.workers - 1, size * others + cut * (load.workers - 1)


def _handover(load: Workload, choice: MemoryPlan) -> tuple[float, float]:
    """Placement `layers`: hidden states from chunk to chunk, spread over the layers."""
    boundaries = (num_chunks(load, choice) - 1) / load.num_layers
    return boundaries * math.ceil(load.tokens / load.batch_tokens), boundaries * load.tokens * load.hidden * load.element_bytes


def num_chunks(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: chunks the layers are cut into; workers take them in turn."""
    return math.ceil(load.num_layers / choice.layers_per_chunk)


def checkpoint_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states written to disk in a sweep: every `memory.checkpoint_layers` layers, or whenever all workers have had a chunk."""
    if load.placement == "layers":
        times = math.ceil(num_chunks(load, choice) / load.workers) - 1
    else:
        times = (load.num_layers - 1) // load.checkpoint_layers if load.checkpoint_layers else 0
    return times * load.tokens * load.hidden * load.element_bytes


def spilled_statistics_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Statistics that go through files on the critical path of a sweep: written once and read once."""
    sizes = (kind.num_layers * statistics_bytes(load, group) for kind in load.kinds for group in load.pruned(kind))
    return 2 * sum(sizes) if choice.spill_statistics else 0


def spilled_hidden_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states of all workers that go through files in a sweep: read and written once for each layer."""
    return 2 * load.num_layers * load.tokens * load.hidden * load.element_bytes if choice.spill_hidden else 0


@dataclass(frozen=True)
class Stage:
    """One kind of work of a sweep: totals over the cluster, and what bounds it on the critical path."""

    name: str
    flops: int
    seconds: float | None = None
    bound_by: str = ""


def stages(load: Workload, choice: MemoryPlan, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """Arithmetic by stage, and with a profile its seconds: the largest of arithmetic, memory, disk and network time.

    Stages of a layer follow one another. `shards`: forward passes and statistics are split over the workers, one worker
    decides and writes while the others wait. `layers`: every worker does all of it for its own layers, after the first
    micro-batch has reached it.
    """
    costs = layer_costs(load, choice)
    work = [(name, sum(getattr(cost, f"{name}_flops") * cost.num_layers for cost in costs)) for name in _STAGES]
    if machine is None:
        return tuple(Stage(name, flops) for name, flops in work)
    seconds = _bounds(load, costs, machine) | {"files": {"disk": _spill_seconds(load, choice, machine)}}
    timed = [Stage(name, flops, *_slowest(seconds[name])) for name, flops in work]
    moved = [Stage(name, 0, *_slowest(seconds[name])) for name in ("messages", "files", "write")]
    return (*timed, *moved, *_evaluation_stage(load, machine))


_STAGES = ("forward", "statistics", "selection", "correction")


def _slowest(bounds: Mapping[str, float]) -> tuple[float, str]:
    name = max(bounds, key=lambda key: bounds[key])
    return bounds[name], name


def _bounds(load: Workload, costs: tuple[LayerCost, ...], machine: MachineProfile) -> dict[str, dict[str, float]]:
    """Seconds on the critical path by stage and by what bounds it."""
    flops = {name: sum(getattr(cost, f"{name}_flops") * cost.num_layers for cost in costs) for name in _STAGES}
    spread, deciders = _parallel(load)
    batches = math.ceil(load.tokens / load.batch_tokens)
    parameters = sum(cost.parameters * cost.num_layers for cost in costs)
    filling = 1 + (load.workers - 1) / batches if load.placement == "layers" else 1.0
    read = sum(cost.read_bytes * cost.num_layers for cost in costs) / (load.workers if load.placement == "shards" else deciders)
    written = sum(cost.written_bytes * cost.num_layers for cost in costs)
    moved = sum(cost.message_bytes * cost.num_layers for cost in costs)
    gram_rate = machine.forward_flops if load.on_gpu and load.element_bytes == 2 else machine.fp32_flops
    return {
        "forward": {
            "arithmetic": flops["forward"] / spread / machine.forward_flops * filling,
            "memory": batches * parameters * load.element_bytes / spread / machine.memory_bandwidth,
            "disk": read / machine.disk_bandwidth,
        },
        "statistics": {
            "arithmetic": flops["statistics"] / spread / gram_rate,
            "memory": batches * _gram_traffic(load) / spread / machine.memory_bandwidth,
        },
        "selection": {
            "arithmetic": flops["selection"] / deciders / machine.fp64_flops,
            "memory": flops["selection"] * 8 / PANEL / deciders / machine.memory_bandwidth,
        },
        "correction": {"arithmetic": flops["correction"] / deciders / machine.fp64_flops},
        "messages": {"network": moved / (1 if load.placement == "shards" else load.workers) / machine.network_bandwidth},
        "write": {"disk": written / deciders / machine.disk_bandwidth},
    }


def _spill_seconds(load: Workload, choice: MemoryPlan, machine: MachineProfile) -> float:
    """Files count as disk, though the pages of a machine with much memory may never get there."""
    spread, deciders = _parallel(load)
    return (spilled_statistics_bytes(load, choice) / deciders + spilled_hidden_bytes(load, choice) / spread) / machine.disk_bandwidth


def _parallel(load: Workload) -> tuple[float, float]:
    """Workers that share the tokens, and workers that decide at the same time, unevenness taken off."""
    if load.placement == "shards":
        return load.tokens / load.share_tokens, 1.0
    return load.num_layers / load.layers_per_worker, load.num_layers / load.layers_per_worker


def _gram_traffic(load: Workload) -> int:
    """Memory traffic of adding one micro-batch to the Gram matrices of all layers: half of fp64 read and written, fp32 twice."""
    groups = [(kind, group) for kind in load.kinds for group in load.pruned(kind) if not in_rows(load, group)]
    return sum(kind.num_layers * group.count * group.width**2 * 12 for kind, group in groups)


def _evaluation_stage(load: Workload, machine: MachineProfile) -> tuple[Stage, ...]:
    """Perplexity of the dense and of the pruned model, each counted as dense."""
    if not load.evaluation_tokens:
        return ()
    decoder = sum(kind.num_layers * kind.active_parameters for kind in load.kinds)
    flops = 2 * load.evaluation_tokens * 2 * (decoder + load.vocabulary * load.hidden)
    bounds = {
        "arithmetic": flops / load.workers / machine.forward_flops,
        "disk": (load.bytes_on_disk + load.output_bytes) / machine.disk_bandwidth,
    }
    return (Stage("evaluate", flops, *_slowest(bounds)),)
