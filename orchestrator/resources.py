"""What a sweep costs: memory of a worker by step, arithmetic, messages, disk, time. Pure numbers; docs/plan.md lists the formulas.

Letters: T tokens, t tokens of a micro-batch, D hidden, F width of a consumer's input, K kept columns, P pruned columns,
N workers, L layers, e bytes per element of the forward type, w bytes per element on disk, n tokens that reach one block
of a group, M the smaller of n and K.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
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
"""CPU: the part of a matrix that is converted from the mapped file at a time."""
BLOCK_ROWS = 512
"""Rows of the blocks in which corrections are computed."""
BLOCKS = 3
"""Blocks of output rows that are held at once: the weight, its change, a product."""
WINDOW = 4
"""Placement `layers`: micro-batches in flight at one worker."""
ACTIVATIONS = 4
"""Tensors of a consumer's width that a forward pass holds at once: gate, up, their product, one temporary."""
PANEL = 128
"""Columns that pivoting takes before it updates the matrix: what its memory traffic is divided by."""


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
    exact: bool = False
    """Whether rows or their R factor are kept instead of a Gram matrix, however many tokens there are (`method.factorization: qr`)."""
    in_process: bool = False
    """Whether payloads between steps lie in the worker's own memory instead of Ray's object store."""
    placement: Placement = "shards"
    propagation: Propagation = "pruned"
    selects: bool = True
    corrects: bool = True

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

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        return max(kind.parameters for kind in self.kinds)

    @property
    def active_width(self) -> int:
        """Numbers of the widest consumer input that one token has, over the blocks it passes through."""
        return max(group.active * group.width for kind in self.kinds for group in kind.groups)

    def phases(self) -> dict[str, "Workload"]:
        """The passes over the model: one, or with `refit` one on the dense path that selects and one on the pruned path that corrects."""
        if self.propagation != "refit":
            return {"": self}
        dense = replace(self, placement="layers", propagation="dense", corrects=False)
        return {"": dense, "refit, ": replace(self, placement="shards", propagation="pruned", selects=False)}


def block_tokens(load: Workload, group: CoupledGroup) -> int:
    """n: tokens that reach one block of a group, routing taken as even."""
    return math.ceil(load.tokens * group.active / group.count)


def in_rows(load: Workload, group: CoupledGroup) -> bool:
    """Whether rows are kept instead of a Gram matrix: asked for, or fewer tokens than columns reach a consumer."""
    return load.exact or block_tokens(load, group) < group.width


def gram_bytes(group: CoupledGroup) -> int:
    """One Gram matrix for every block: count F^2 8."""
    return group.count * group.width**2 * 8


def statistics_bytes(load: Workload, group: CoupledGroup) -> int:
    """Training and held-out statistic: two Gram matrices (or R factors) for every block; rows, of which each is in one, once."""
    if in_rows(load, group) and block_tokens(load, group) < group.width:
        return group.count * block_tokens(load, group) * group.width * load.element_bytes
    return 2 * gram_bytes(group)


def partial_bytes(load: Workload, group: CoupledGroup) -> int:
    """Statistics of one worker while it collects its shards: a sum for every level of their merge tree, or its share of the rows."""
    if in_rows(load, group):
        return min(math.ceil(statistics_bytes(load, group) * load.share_tokens / load.tokens), 2 * gram_bytes(group))
    return gram_bytes(group) * (1 + math.ceil(math.log2(math.ceil(load.shards / load.workers))))


@dataclass(frozen=True)
class Decision:
    """Memory of one decision, in bytes: what can lie in files, and what cannot."""

    spillable: int
    plain: int


def decision_bytes(load: Workload, group: CoupledGroup) -> Decision:
    """The larger of selecting and correcting; the corrected weight D K w lies beside the original, on the host."""
    moments = ([_selection_bytes(load, group)] if load.selects else []) + (_correction_bytes(load, group) if load.corrects else [])
    largest = max(moments, key=lambda moment: moment.spillable + moment.plain)
    result = load.hidden * load.columns(group) * load.written_element_bytes if load.corrects and not load.on_gpu else 0
    return Decision(largest.spillable, max(moment.plain for moment in moments) + result)


def _selection_bytes(load: Workload, group: CoupledGroup) -> Decision:
    """Pivoting destroys a scaled copy: F^2 8, or of rows n F 8."""
    return Decision(8 * group.width * _rows(load, group), 0)


def _rows(load: Workload, group: CoupledGroup) -> int:
    """Rows of the matrix that is factorised: F, or n where that is less and rows are kept."""
    return min(block_tokens(load, group), group.width) if in_rows(load, group) else group.width


def _correction_bytes(load: Workload, group: CoupledGroup) -> list[Decision]:
    """Moments of a correction.

    Gram: targets D K 8 with the pruned part P K 8, then with the factor K^2 8 (twice on a GPU). Rows: Z_K and its QR,
    3 n K 8; then the targets D M 8 with Q (n K 8), and Z_P (n P 8) or the damped factor, 6 M^2 8. Besides, blocks of rows.
    """
    kept, rows = load.columns(group), _rows(load, group)
    blocks = BLOCKS * 8 * min(BLOCK_ROWS, load.hidden) * group.width
    if not in_rows(load, group):
        factor = kept**2 * (2 if load.on_gpu else 1)
        return [Decision(8 * (load.hidden * kept + max((group.width - kept) * kept, factor)), blocks)]
    small = min(rows, kept)
    pruned = Decision(8 * (load.hidden * small + rows * (group.width - kept)), 8 * (rows * kept + small**2) + blocks)
    return [
        Decision(8 * rows * kept, 16 * rows * kept),
        pruned,
        Decision(8 * load.hidden * small, 8 * (rows * kept + 7 * small**2) + blocks),
    ]


def factorisation_bytes(load: Workload, group: CoupledGroup) -> int:
    """One decision, all of it in memory."""
    decision = decision_bytes(load, group)
    return decision.spillable + decision.plain


def memory_by_step(load: Workload, choice: MemoryPlan) -> dict[str, Kinds]:
    """Bytes a worker needs, by step and by kind; of layers and groups that differ, those that need most."""
    table: dict[str, Kinds] = {}
    for name, phase in load.phases().items():
        table |= {name + step: max(rows, key=total) for step, rows in _steps(phase, choice).items() if rows}
    if not load.on_gpu:
        table["write outer"] = {"runtime": RUNTIME_BYTES, "output": load.outer_parameters * load.written_element_bytes}
    return table | ({"evaluate": _evaluation(load, choice)} if load.evaluation_tokens else {})


def _steps(load: Workload, choice: MemoryPlan) -> dict[str, list[Kinds]]:
    """For each step what it may need, over all kinds of layers and groups."""
    standing = _standing(load, choice)
    steps: dict[str, list[Kinds]] = {"collect": [], "decide": [], "write": []}
    for kind in load.kinds:
        for group in load.pruned(kind):
            steps["collect"].append(standing | _activations(load) | {"statistics": _collected(load, choice, kind, group)})
        for group in load.pruned(kind):
            deciding = {"statistics": _decided(load, choice, kind, group), "decision": _deciding(load, choice, group)}
            steps["decide"].append(standing | _payloads(load, group) | deciding)
        if load.corrects and not load.on_gpu:
            steps["write"].append(standing | _left_while_writing(load, choice) | {"output": 2 * _written_layer_bytes(load, kind)})
    return steps


def host_bytes(load: Workload) -> int:
    """Memory of the machine that a GPU worker needs: two copies of a layer, or one of embeddings and head, while it writes."""
    layer = 2 * max(_written_layer_bytes(load, kind) for kind in load.kinds)
    return RUNTIME_BYTES + max(layer, load.outer_parameters * load.written_element_bytes) if load.on_gpu else 0


def total(kinds: Kinds) -> int:
    """Bytes of all kinds together."""
    return sum(kinds.values())


def peak_bytes(load: Workload, choice: MemoryPlan) -> int:
    """The most a worker needs at once."""
    return max(map(total, memory_by_step(load, choice).values()))


def _standing(load: Workload, choice: MemoryPlan) -> Kinds:
    """What is held through all of a layer's steps."""
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(load, choice.layers_per_chunk),
        "hidden states": _hidden_bytes(load, choice),
        "inputs": _inputs_bytes(load, choice),
    }


def _weights_bytes(load: Workload, layers_per_chunk: int) -> int:
    """GPU: embeddings and head, and the layer with its successor, or the chunk. CPU: mapped from the file, but for a part."""
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
    if load.placement == "layers":
        return _chunk_statistics(load, choice, kind)
    return 0 if choice.spill_statistics else partial_bytes(load, group)


def _decided(load: Workload, choice: MemoryPlan, kind: LayerKind, group: CoupledGroup) -> int:
    if load.placement == "layers":
        return _chunk_statistics(load, choice, kind)
    return 0 if choice.spill_statistics else statistics_bytes(load, group)


def _payloads(load: Workload, group: CoupledGroup) -> Kinds:
    """One process, placement `shards`: Gram matrices as they were handed over, of which the decision makes copies; rows are not copied."""
    copied = load.in_process and load.placement == "shards" and not in_rows(load, group)
    return {"payloads": statistics_bytes(load, group)} if copied else {}


def _deciding(load: Workload, choice: MemoryPlan, group: CoupledGroup) -> int:
    decision = decision_bytes(load, group)
    return decision.plain + (0 if choice.spill_statistics else decision.spillable)


def _chunk_statistics(load: Workload, choice: MemoryPlan, kind: LayerKind) -> int:
    """Statistics of all groups of all layers of a chunk; pages of files are no private memory."""
    layers = 0 if choice.spill_statistics else choice.layers_per_chunk
    return layers * sum(statistics_bytes(load, group) for group in load.pruned(kind))


def _left_while_writing(load: Workload, choice: MemoryPlan) -> Kinds:
    """Placement `layers`: the statistics of the chunk's other layers are still there."""
    if load.placement == "shards" or choice.spill_statistics:
        return {}
    return {"statistics": max(_chunk_statistics(load, choice, kind) for kind in load.kinds)}


def _written_layer_bytes(load: Workload, kind: LayerKind) -> int:
    return load.kept_parameters(kind) * load.written_element_bytes


def _evaluation(load: Workload, choice: MemoryPlan) -> Kinds:
    """Hidden states of a worker's windows, and the scores of one window: as computed, in fp32, and their logarithms."""
    window = load.evaluation_window
    windows = 1 if choice.spill_hidden else math.ceil(load.evaluation_tokens / window / load.workers)
    scores = load.vocabulary * (load.element_bytes + 8)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": _weights_bytes(replace(load, placement="shards"), 1),
        "hidden states": windows * window * load.hidden * load.element_bytes,
        "activations": window * max(scores, ACTIVATIONS * load.active_width * load.element_bytes),
    }


def choices(load: Workload) -> Iterator[MemoryPlan]:
    """Ways to use memory, the fastest first; of chunks, the longest first. A GPU does not compute on statistics in files."""
    kept = MemoryPlan()
    without_inputs = replace(kept, keep_inputs=False)
    hidden_in_files = replace(without_inputs, spill_hidden=True)
    by_phase = {"pruned": (kept, without_inputs, hidden_in_files), "dense": (kept,), "refit": (kept, without_inputs, hidden_in_files)}
    in_memory = by_phase[load.propagation]
    chunks = range(1, 0, -1) if load.propagation == "pruned" else range(load.layers_per_worker, 0, -1)
    in_files = () if load.on_gpu else (replace(in_memory[-1], spill_statistics=True),)
    for choice in (*in_memory, *in_files):
        yield from (replace(choice, layers_per_chunk=count) for count in chunks)


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
    grow = "raise memory.worker" if limit_name == "memory.worker" else "take machines with more memory, up"
    table = memory_by_step(load, least := list(choices(load))[-1])
    step = max(table, key=lambda name: total(table[name]))
    parts = sorted(table[step].items(), key=lambda item: -item[1])[:3]
    need, largest = gib(peak_bytes(load, least)), ", ".join(f"{name} {gib(size)}" for name, size in parts)
    raise ResourceError(
        f"{limit_name}: a worker needs at least {need} (step {step}: {largest}), it may use {gib(limit_bytes)}; "
        f"{grow} to {need}{_remedies(load, limit_bytes)}"
    )


def _remedies(load: Workload, limit_bytes: int) -> str:
    """Fields that would help, by trying them."""
    found = [""]
    if workers := fewest_workers(load, limit_bytes):
        found.append(f"raise parallel.workers to {workers}")
    if load.micro_batch > 1 and fitting(replace(load, micro_batch=1), limit_bytes):
        found.append("lower parallel.micro_batch to 1")
    if samples := _fewer_samples(load, limit_bytes):
        found.append(f"lower calibration.samples to {samples}")
    if load.propagation == "pruned" and fitting(replace(load, placement="layers", propagation="dense"), limit_bytes):
        found.append("set parallel.placement: layers")
    return ", or ".join(found)


def _fewer_samples(load: Workload, limit_bytes: int) -> int | None:
    fewer = [load.samples >> shift for shift in range(1, load.samples.bit_length())]
    return next((count for count in fewer if count >= load.shards and fitting(replace(load, samples=count), limit_bytes)), None)


def fewest_workers(load: Workload, limit_bytes: int, keep_all: bool = False) -> int | None:
    """The smallest number of workers with which the job fits; with `keep_all`, with nothing recomputed or in files and in one wave."""
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
    """One layer task, summed over all workers and phases."""

    first: int
    num_layers: int
    parameters: int
    active_parameters: int
    weight_bytes: int
    hidden_bytes: int
    input_bytes: int
    statistics_bytes: int
    decision_bytes: int
    forward_flops: int
    statistics_flops: int
    selection_flops: int
    correction_flops: int
    num_messages: int
    message_bytes: int
    read_bytes: int
    written_bytes: int


_ADDED = (
    "forward_flops",
    "statistics_flops",
    "selection_flops",
    "correction_flops",
    "num_messages",
    "message_bytes",
    "read_bytes",
    "written_bytes",
)
"""What phases add up; of the rest the largest counts."""


def layer_costs(load: Workload, choice: MemoryPlan) -> tuple[LayerCost, ...]:
    """The layer tasks, one entry for each kind of layer."""
    phases = [[_layer_cost(phase, choice, kind) for kind in load.kinds] for phase in load.phases().values()]
    return tuple(_together(costs) for costs in zip(*phases, strict=True))


def _together(costs: tuple[LayerCost, ...]) -> LayerCost:
    names = [field.name for field in fields(LayerCost)]
    return LayerCost(**{name: (sum if name in _ADDED else max)(getattr(cost, name) for cost in costs) for name in names})


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
        decision_bytes=max((factorisation_bytes(load, group) for group in groups), default=0),
        forward_flops=_forward_passes(load, choice) * forward_flops(load, kind),
        statistics_flops=sum(statistics_flops(load, group) for group in groups),
        selection_flops=sum(selection_flops(load, group) for group in groups) if load.selects else 0,
        correction_flops=sum(correction_flops(load, group) for group in groups) if load.corrects else 0,
        num_messages=math.ceil(sum(count for count, _ in messages)),
        message_bytes=math.ceil(sum(size for _, size in messages)),
        read_bytes=readers * kind.num_bytes,
        written_bytes=_written_layer_bytes(load, kind) if load.corrects else 0,
    )


def _forward_passes(load: Workload, choice: MemoryPlan) -> int:
    """One, and another where Z is computed again."""
    return 1 + (load.placement == "shards" and not choice.keep_inputs)


def forward_flops(load: Workload, kind: LayerKind) -> int:
    """2 T per active parameter, and T (sequence length) of causal attention for every number a query meets."""
    return load.tokens * (2 * kind.active_parameters + load.sequence_length * kind.attention_width)


def statistics_flops(load: Workload, group: CoupledGroup) -> int:
    """T F^2, half of the product, for the blocks a token passes through; rows cost nothing, their R factor 2 T F^2."""
    if not in_rows(load, group):
        return load.tokens * group.active * group.width**2
    return 0 if block_tokens(load, group) < group.width else 2 * load.tokens * group.active * group.width**2


def selection_flops(load: Workload, group: CoupledGroup) -> int:
    """Pivoting, for every block: F^3/3 on a Gram matrix, 4 n^2 F on rows."""
    if in_rows(load, group):
        return group.count * 4 * _rows(load, group) ** 2 * group.width
    return group.count * group.width**3 // 3


def correction_flops(load: Workload, group: CoupledGroup) -> int:
    """For every candidate, and three times for the rest: K^3/3 + 2 K^2 D + F^2 D; on rows 6 M^3 + 3 M^2 D + 2 n (F + K) D, and one QR."""
    kept, fits, rows = load.columns(group), load.num_candidates + 3, _rows(load, group)
    if not in_rows(load, group):
        return group.count * fits * (kept**3 // 3 + 2 * kept**2 * load.hidden + group.width**2 * load.hidden)
    small, large = sorted((rows, kept))
    each = 6 * small**3 + 3 * small**2 * load.hidden + 2 * rows * (group.width + kept) * load.hidden
    return group.count * (4 * large * small**2 + fits * each)


def _messages(load: Workload, group: CoupledGroup) -> tuple[float, float]:
    """Placement `shards`: what goes up the reduction, and the cut that goes to all other workers."""
    levels = reduction_levels(load)
    moved = sum(_payload_bytes(load, group, part) for level in levels for part in level)
    return sum(map(len, levels)) + load.workers - 1, moved + (load.workers - 1) * _cut_bytes(load, group)


def _cut_bytes(load: Workload, group: CoupledGroup) -> int:
    return group.count * load.hidden * load.columns(group) * load.written_element_bytes


def _payload_bytes(load: Workload, group: CoupledGroup, part: range) -> int:
    """Statistics of a range of shards: a Gram matrix for each of the largest tree nodes it covers, or its rows."""
    if in_rows(load, group):
        return math.ceil(statistics_bytes(load, group) * len(part) / load.shards)
    return gram_bytes(group) * sum(len(owned_nodes(root, part)) for root in roots(load.shards, load.held_out_shards))


def reduction_levels(load: Workload) -> list[list[range]]:
    """Placement `shards`: the shard ranges whose statistics move, level by level; merged in pairs until two are left for the decider.

    Of those two, one is taken as its own.
    """
    parts, levels = [part for part in even_parts(load.shards, load.workers) if part], []
    while len(parts) > 2:
        levels.append(parts[1::2])
        parts = [range(pair[0].start, pair[-1].stop) for pair in (parts[start : start + 2] for start in range(0, len(parts), 2))]
    return [*levels, parts[1:]] if len(parts) > 1 else levels


def _handover(load: Workload, choice: MemoryPlan) -> tuple[float, float]:
    """Placement `layers`: hidden states from chunk to chunk within a wave, spread over the layers."""
    boundaries = (num_chunks(load, choice) - num_waves(load, choice)) / load.num_layers
    return boundaries * math.ceil(load.tokens / load.batch_tokens), boundaries * load.tokens * load.hidden * load.element_bytes


def num_chunks(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: chunks the layers are cut into."""
    return min(load.num_layers, max(math.ceil(load.num_layers / choice.layers_per_chunk), num_waves(load, choice) * load.workers))


def num_waves(load: Workload, choice: MemoryPlan) -> int:
    """Placement `layers`: how often all workers take a chunk."""
    return math.ceil(load.num_layers / (load.workers * choice.layers_per_chunk))


def checkpoint_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states written to disk in a sweep: every `memory.checkpoint_layers` layers, or behind every wave but the last."""
    times = 0
    for phase in load.phases().values():
        if phase.placement == "layers":
            times += num_waves(phase, choice) - 1
        elif phase.checkpoint_layers:
            times += (phase.num_layers - 1) // phase.checkpoint_layers
    return times * load.tokens * load.hidden * load.element_bytes


def spilled_bytes(load: Workload, choice: MemoryPlan) -> int:
    """What goes through files instead of memory in a sweep, over all workers, written and read."""
    return sum(_spilled_statistics(phase, choice) + _spilled_hidden(phase, choice) for phase in load.phases().values())


def _spilled_statistics(load: Workload, choice: MemoryPlan) -> int:
    """Statistics, written once and read once."""
    sizes = (kind.num_layers * statistics_bytes(load, group) for kind in load.kinds for group in load.pruned(kind))
    return 2 * sum(sizes) if choice.spill_statistics else 0


def _spilled_hidden(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states, read and written once for each layer."""
    is_spilled = choice.spill_hidden and load.placement == "shards"
    return 2 * load.num_layers * load.tokens * load.hidden * load.element_bytes if is_spilled else 0


@dataclass(frozen=True)
class Stage:
    """One kind of work of a sweep: its arithmetic over the cluster, and what bounds it on the critical path."""

    name: str
    flops: int
    seconds: float | None = None
    bound_by: str = ""


Bounds = dict[str, float]
"""Seconds by what takes them."""
STAGES = ("forward", "statistics", "selection", "correction", "messages", "files", "write")


def stages(load: Workload, choice: MemoryPlan, machine: MachineProfile | None) -> tuple[Stage, ...]:
    """Arithmetic by stage, and with a profile its seconds: the largest of arithmetic, memory, disk and network time.

    Stages of a layer follow one another. `shards`: forward passes and statistics are split over the workers, one worker
    decides and writes while the others wait. `layers`: every worker does all of it for its own layers, after the first
    micro-batch has reached it. `refit` is one after the other.
    """
    costs = layer_costs(load, choice)
    flops = {name: sum(getattr(cost, f"{name}_flops", 0) * cost.num_layers for cost in costs) for name in STAGES}
    if machine is None:
        return tuple(Stage(name, flops[name]) for name in STAGES[:4])
    timed = [_timed(name, flops[name], [_bounds(phase, choice, machine)[name] for phase in load.phases().values()]) for name in STAGES]
    return (*timed, *_evaluation_stage(load, machine))


def _timed(name: str, flops: int, phases: list[Bounds]) -> Stage:
    """A stage over all phases; it is bound by what bounds the longest of them."""
    slowest = [max(bounds, key=lambda key: bounds[key]) for bounds in phases]
    seconds = [bounds[key] for bounds, key in zip(phases, slowest, strict=True)]
    return Stage(name, flops, sum(seconds), slowest[seconds.index(max(seconds))])


def _bounds(load: Workload, choice: MemoryPlan, machine: MachineProfile) -> dict[str, Bounds]:
    """Seconds on the critical path of one phase, by stage and by what takes them."""
    costs = [_layer_cost(load, choice, kind) for kind in load.kinds]
    work = {name: sum(getattr(cost, name) * cost.num_layers for cost in costs) for name in ("parameters", *_ADDED)}
    spread, deciders = _parallel(load)
    batches = math.ceil(load.tokens / load.batch_tokens)
    readers = load.workers if load.placement == "shards" else deciders
    gram_rate = machine.forward_flops if load.on_gpu and load.element_bytes == 2 else machine.fp32_flops
    return {
        "forward": {
            "arithmetic": work["forward_flops"] / spread / machine.forward_flops * _filling(load, batches, choice),
            "memory": batches * work["parameters"] * load.element_bytes / spread / machine.memory_bandwidth,
            "disk": work["read_bytes"] / readers / machine.disk_bandwidth,
        },
        "statistics": {
            "arithmetic": work["statistics_flops"] / spread / gram_rate,
            "memory": batches * _gram_traffic(load) / spread / machine.memory_bandwidth,
        },
        "selection": {
            "arithmetic": work["selection_flops"] / deciders / machine.fp64_flops,
            "memory": work["selection_flops"] * 8 / PANEL / deciders / machine.memory_bandwidth,
        },
        "correction": {"arithmetic": work["correction_flops"] / deciders / machine.fp64_flops},
        "messages": {"network": _message_path(load, work["message_bytes"]) / machine.network_bandwidth},
        "files": {"disk": (_spilled_statistics(load, choice) / deciders + _spilled_hidden(load, choice) / spread) / machine.disk_bandwidth},
        "write": {"disk": work["written_bytes"] / deciders / machine.disk_bandwidth},
    }


def _parallel(load: Workload) -> tuple[float, float]:
    """Workers that share the tokens, and workers that decide at the same time, unevenness taken off."""
    if load.placement == "shards":
        return load.tokens / load.share_tokens, 1.0
    return load.num_layers / load.layers_per_worker, load.num_layers / load.layers_per_worker


def _filling(load: Workload, batches: int, choice: MemoryPlan) -> float:
    """Placement `layers`: a wave takes as many steps as there are micro-batches, and one less than workers to fill."""
    workers = min(load.workers, num_chunks(load, choice))
    return (batches + workers - 1) / batches if load.placement == "layers" else 1.0


def _message_path(load: Workload, all_bytes: int) -> float:
    """Bytes on the critical path. `shards`: the largest payload of each level, and the cuts from one worker; `layers`: spread evenly."""
    if load.placement == "layers":
        return all_bytes / load.workers
    levels, path = reduction_levels(load), 0
    for kind in load.kinds:
        for group in load.pruned(kind):
            reduction = sum(max(_payload_bytes(load, group, part) for part in level) for level in levels)
            path += kind.num_layers * (reduction + (load.workers - 1) * _cut_bytes(load, group))
    return path


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
    return (_timed("evaluate", flops, [bounds]),)
