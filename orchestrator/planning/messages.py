"""What goes from worker to worker: statistics and cuts with placement `shards`, hidden states with
placement `layers`.
"""

import math

from rayprune.orchestrator.planning.group_memory import gram_bytes, statistics_bytes
from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.workload import Workload, in_rows, num_chunks, num_waves
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.model.description import Group
from rayprune.workers.store.shards import even_parts, owned_nodes, roots


def layer_messages(load: Workload, choice: MemoryPlan, kind: LayerKind) -> tuple[int, int]:
    """Messages of one layer task and their bytes, over all workers."""
    messages = (
        [_group_messages(load, group) for group in load.decided(kind)]
        if load.placement == "shards"
        else [_handover(load, choice)]
    )
    return math.ceil(sum(count for count, _ in messages)), math.ceil(
        sum(size for _, size in messages)
    )


def _group_messages(load: Workload, group: Group) -> tuple[float, float]:
    """Placement `shards`: what goes up the reduction, and the cut that goes to all other workers,
    of every block.
    """
    levels, blocks = reduction_levels(load), load.blocks(group)
    moved = sum(_payload_bytes(load, group, part) for level in levels for part in level)
    return (
        blocks * (sum(map(len, levels)) + load.workers - 1),
        blocks * (moved + (load.workers - 1) * _cut_bytes(load, group)),
    )


def _cut_bytes(load: Workload, group: Group) -> int:
    if load.masks:
        return group.parameters * load.written_element_bytes
    return load.hidden * load.columns(group) * load.written_element_bytes


def _payload_bytes(load: Workload, group: Group, part: range) -> int:
    """Statistics of a range of shards: a Gram matrix for each of the largest tree nodes it covers,
    or its rows.
    """
    if in_rows(load, group):
        return math.ceil(statistics_bytes(load, group) * len(part) / load.shards)
    return gram_bytes(load, group) * sum(
        len(owned_nodes(root, part)) for root in roots(load.shards, load.held_out_shards)
    )


def reduction_levels(load: Workload) -> list[list[range]]:
    """Placement `shards`: the shard ranges whose statistics move, level by level; merged in pairs
    until two are left for the decider.

    Of those two, one is taken as its own.
    """
    parts, levels = [part for part in even_parts(load.shards, load.workers) if part], []
    while len(parts) > 2:
        levels.append(parts[1::2])
        parts = [
            range(pair[0].start, pair[-1].stop)
            for pair in (parts[start : start + 2] for start in range(0, len(parts), 2))
        ]
    return [*levels, parts[1:]] if len(parts) > 1 else levels


def _handover(load: Workload, choice: MemoryPlan) -> tuple[float, float]:
    """Placement `layers`: hidden states from chunk to chunk within a wave, spread over the
    layers.
    """
    boundaries = (num_chunks(load, choice) - num_waves(load, choice)) / load.num_layers
    return (
        boundaries * math.ceil(load.tokens / load.batch_tokens),
        boundaries * load.tokens * load.handed_on * load.element_bytes,
    )


def message_path_bytes(load: Workload, all_bytes: int) -> float:
    """Bytes on the critical path. `shards`: the largest payload of each level, and the cuts from
    one worker; `layers`: spread evenly.
    """
    if load.placement == "layers":
        return all_bytes / load.workers
    levels, path = reduction_levels(load), 0
    for kind in load.kinds:
        for group in load.decided(kind):
            reduction = sum(
                max(_payload_bytes(load, group, part) for part in level) for level in levels
            )
            block = reduction + (load.workers - 1) * _cut_bytes(load, group)
            path += kind.num_layers * load.blocks(group) * block
    return path
