"""What goes from worker to worker, on a case small enough for a pencil."""

from dataclasses import replace

from rayprune.orchestrator.planning.messages import layer_messages, reduction_levels
from rayprune.specs.memory import MemoryPlan
from tests.unit.orchestrator.workloads import DENSE, LAYERS, LOAD


def test_messages_of_shards() -> None:
    """Training shards 0-2, held-out shard 3. The decider has shards 0-1; nodes 2 and 3 come from
    the other worker.
    """
    num_messages, message_bytes = layer_messages(LOAD, MemoryPlan(), DENSE)
    assert message_bytes == 2 * 800 + 4 * 7 * 2
    assert num_messages == 2
    assert layer_messages(replace(LOAD, workers=1), MemoryPlan(), DENSE) == (0, 0)


def test_statistics_are_merged_in_pairs() -> None:
    load = replace(LOAD, shards=8, workers=8)
    assert reduction_levels(load) == [
        [range(n, n + 1) for n in (1, 3, 5, 7)],
        [range(2, 4), range(6, 8)],
        [range(4, 8)],
    ]
    assert reduction_levels(replace(load, workers=3)) == [[range(2, 5)], [range(5, 8)]]
    assert reduction_levels(replace(load, workers=1)) == []


def test_messages_of_layers() -> None:
    _, message_bytes = layer_messages(LAYERS, MemoryPlan(layers_per_chunk=3), DENSE)
    assert message_bytes == -(-128 * 4 * 4 // 6)  # one boundary, spread over six layers
