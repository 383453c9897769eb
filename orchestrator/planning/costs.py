"""What a sweep does: arithmetic of its layer tasks, and what they read, send and write.

Letters: T tokens, D hidden, Z a consumer's input, F its width, K kept columns, n tokens that reach
one block of a group, M the smaller of n and K.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from rayprune.orchestrator.planning.group_memory import factorisation_bytes, statistics_bytes
from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.messages import layer_messages
from rayprune.orchestrator.planning.workload import (
    Workload,
    block_tokens,
    factorised_rows,
    in_rows,
    num_waves,
    ranked_group,
)
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.model.description import Group
from rayprune.workers.store.layout import RECOVER_TASK


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
    solving_flops: int
    """Those of the correction that factor and solve, which is slower than products are."""
    num_messages: int
    message_bytes: int
    read_bytes: int
    written_bytes: int


_ADDED = (
    "forward_flops",
    "statistics_flops",
    "selection_flops",
    "correction_flops",
    "solving_flops",
    "num_messages",
    "message_bytes",
    "read_bytes",
    "written_bytes",
)
"""What phases add up; of the rest the largest counts."""


def layer_costs(load: Workload, choice: MemoryPlan) -> tuple[LayerCost, ...]:
    """The layer tasks, one entry for each kind of layer."""
    phases = [phase_costs(phase, choice) for phase in load.phases().values()]
    return tuple(_together(costs) for costs in zip(*phases, strict=True))


def phase_costs(load: Workload, choice: MemoryPlan) -> tuple[LayerCost, ...]:
    """The layer tasks of one pass over the model."""
    return tuple(_layer_cost(load, choice, kind) for kind in load.kinds)


def over_layers(costs: Iterable[LayerCost], name: str) -> int:
    """One number of the layer tasks, summed over all layers."""
    return sum(int(getattr(cost, name)) * cost.num_layers for cost in costs)


def _together(costs: tuple[LayerCost, ...]) -> LayerCost:
    names = [field.name for field in fields(LayerCost)]
    return LayerCost(
        **{
            name: (sum if name in _ADDED else max)(getattr(cost, name) for cost in costs)
            for name in names
        }
    )


def _layer_cost(load: Workload, choice: MemoryPlan, kind: LayerKind) -> LayerCost:
    groups = load.decided(kind)
    num_messages, message_bytes = layer_messages(load, choice, kind)
    readers = load.workers if load.placement == "shards" else 1
    return LayerCost(
        first=kind.first,
        num_layers=kind.num_layers,
        parameters=kind.parameters,
        active_parameters=kind.active_parameters,
        weight_bytes=kind.num_bytes,
        hidden_bytes=load.tokens * load.hidden * load.element_bytes,
        input_bytes=sum(
            load.tokens * group.active * group.width * load.element_bytes for group in groups
        ),
        statistics_bytes=sum(load.blocks(g) * statistics_bytes(load, g) for g in groups),
        decision_bytes=max((factorisation_bytes(load, group) for group in groups), default=0),
        forward_flops=(
            _forward_passes(load, choice) * forward_flops(load, kind) + experts_flops(load, kind)
        ),
        statistics_flops=sum(statistics_flops(load, group) for group in groups),
        selection_flops=(
            sum(selection_flops(load, group) for group in load.pruned(kind)) if load.selects else 0
        ),
        correction_flops=(
            sum(correction_flops(load, group) for group in groups) if load.corrects else 0
        ),
        solving_flops=sum(solving_flops(load, group) for group in groups) if load.corrects else 0,
        num_messages=num_messages,
        message_bytes=message_bytes,
        read_bytes=readers * kind.num_bytes,
        written_bytes=load.written_layer_bytes(kind) if load.writes else 0,
    )


def _forward_passes(load: Workload, choice: MemoryPlan) -> int:
    """One, another where Z is computed again, and one on the dense path beside the pruned one."""
    return 1 + (load.placement == "shards" and not choice.keep_inputs) + load.corrects_drift


def forward_flops(load: Workload, kind: LayerKind) -> int:
    """2 T per active parameter, and T (sequence length) of causal attention for every number a
    query meets; twice that where tokens look in both directions. Inputs made of the tokens are
    made for all layers before each.
    """
    met = load.sequence_length * (1 if load.causal else 2)
    inputs = load.num_layers * load.token_inputs * load.hidden
    return load.tokens * (2 * (kind.active_parameters + inputs) + met * kind.attention_width)


def experts_flops(load: Workload, kind: LayerKind) -> int:
    """What experts compute besides: all of it before some are chosen, gate and up for statistics
    and for the cut.
    """
    if load.placement == "layers" or load.experts is None:
        return 0
    width = sum(group.active * group.width for group in kind.groups if group.count > 1)
    matrices = 3 * any(group.kind == "experts" for group in load.pruned(kind))
    matrices += 4 * any(group.count > 1 for group in load.pruned(kind))
    return load.tokens * 2 * matrices * width * load.hidden


def statistics_flops(load: Workload, group: Group) -> int:
    """T F^2, half of the product, for the blocks a token passes through; rows cost nothing, their R
    factor 2 T F^2.

    With drift, its product with Z and the uncut output: 4 T F D.
    """
    if not in_rows(load, group):
        drift = 4 * group.width * load.hidden if load.corrects_drift else 0
        return load.tokens * group.active * (group.width**2 + drift)
    return (
        0
        if block_tokens(load, group) < group.width
        else 2 * load.tokens * group.active * group.width**2
    )


def selection_flops(load: Workload, group: Group) -> int:
    """Ranking the units, for every block: `MethodOptions.ranking_flops`."""
    return load.blocks(group) * load.ranking.ranking_flops(ranked_group(load, group))


def correction_flops(load: Workload, group: Group) -> int:
    """`solving_flops`, and energies: K^2 D for every candidate, twice (F^2 + P^2) D; on rows 2 n
    (F + K) D for every candidate and three besides.
    """
    if load.masks:  # of the output, twice; of what was made, twice; of the mask alone
        return solving_flops(load, group) + 5 * group.width * group.parameters
    kept, candidates = load.columns(group), load.num_candidates
    pruned = group.width - kept
    energies = (candidates * kept**2 + 2 * (group.width**2 + pruned**2)) * load.hidden
    if in_rows(load, group):
        size = 2 * factorised_rows(load, group) * (group.width + kept) * load.hidden
        energies = (candidates + 3) * size
    return solving_flops(load, group) + load.blocks(group) * energies


def solving_flops(load: Workload, group: Group) -> int:
    """A factor and a solution for every candidate, as if none were left out, and for the result:
    K^3/3 + 2 K^2 D, on rows 6 M^3 + 3 M^2 D and one QR. Of zeros with `obs` two fits: 2 F^3/3 + F^2
    D, D all outputs of a site.
    """
    if load.masks:
        fits = 2 * (load.masks.score == "obs")
        return fits * (2 * group.width**3 // 3 + group.width * group.parameters)
    kept, fits, rows = load.columns(group), load.num_candidates + 1, factorised_rows(load, group)
    if not in_rows(load, group):
        return load.blocks(group) * fits * (kept**3 // 3 + 2 * kept**2 * load.hidden)
    small, large = sorted((rows, kept))
    once = 4 * large * small**2
    return load.blocks(group) * (once + fits * (6 * small**3 + 3 * small**2 * load.hidden))


@dataclass(frozen=True)
class Traffic:
    """What a sweep sends, reads and writes, over all workers and layers."""

    num_messages: int
    message_bytes: int
    read_bytes: int
    checkpoint_bytes: int
    spilled_bytes: int


def traffic(load: Workload, choice: MemoryPlan) -> Traffic:
    """Messages, weights that are read, hidden states that are saved, and what goes through files
    instead of memory.
    """
    costs = layer_costs(load, choice)
    return Traffic(
        num_messages=over_layers(costs, "num_messages"),
        message_bytes=over_layers(costs, "message_bytes"),
        read_bytes=over_layers(costs, "read_bytes"),
        checkpoint_bytes=checkpoint_bytes(load, choice),
        spilled_bytes=spilled_bytes(load, choice),
    )


def checkpoint_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states written to disk in a sweep: every `memory.checkpoint_layers` layers, or behind
    every wave but the last; there also where layers are recovered alone.
    """
    times = 0
    for phase in load.phases().values():
        if phase.placement == "layers":
            times += num_waves(phase, choice) - 1
        elif phase.checkpoint_layers:
            times += (phase.num_layers - 1) // phase.checkpoint_layers
    alone = [each for each in load.trainings if each.each_layer and each.task == RECOVER_TASK]
    tokens = sum(each.streamed_windows * each.sequence_length for each in alone)
    written = times * load.tokens + (num_waves(load, choice) - 1) * tokens
    return written * load.handed_on * load.element_bytes


def spilled_bytes(load: Workload, choice: MemoryPlan) -> int:
    """What goes through files instead of memory, over all workers, written and read."""
    alone = sum(each.streamed_windows * each.sequence_length for each in load.trainings)
    phases = sum(
        spilled_statistics_bytes(phase, choice) + spilled_hidden_bytes(phase, choice)
        for phase in load.phases().values()
    )
    return (
        phases
        + gradient_states_bytes(load)
        + alone * 4 * load.num_layers * load.hidden * load.element_bytes
    )


def gradient_states_bytes(load: Workload) -> int:
    """Hidden states before every layer of the windows on which gradients are measured, written and
    read.
    """
    return (
        2
        * load.num_layers
        * load.gradient_windows
        * load.sequence_length
        * load.hidden
        * load.element_bytes
    )


def spilled_statistics_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Statistics in files, written once and read once."""
    sizes = (
        kind.num_layers * load.blocks(group) * statistics_bytes(load, group)
        for kind in load.kinds
        for group in load.decided(kind)
    )
    return 2 * sum(sizes) if choice.spill_statistics else 0


def spilled_hidden_bytes(load: Workload, choice: MemoryPlan) -> int:
    """Hidden states in files, read and written once for each layer."""
    is_spilled = choice.spill_hidden and load.placement == "shards"
    numbers = load.num_layers * load.tokens * (load.hidden + load.token_inputs)
    return 2 * numbers * load.element_bytes if is_spilled else 0
