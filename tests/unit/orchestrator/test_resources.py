"""The cost formulas on a case small enough for a pencil."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from orchestrator import resources
from orchestrator.resources import CONVERSION_BYTES, RUNTIME_BYTES, Decision, Workload
from specs.errors import ResourceError
from specs.machine import PROFILES
from specs.memory import MemoryPlan
from workers.shapes import CoupledGroup, LayerKind

HEADS = CoupledGroup("heads", count=1, active=1, num_units=2, columns=3, unit_parameters=50)
NEURONS = CoupledGroup("neurons", count=1, active=1, num_units=10, columns=1, unit_parameters=12)
EXPERTS = CoupledGroup("experts", count=4, active=2, num_units=10, columns=1, unit_parameters=12)
DENSE = LayerKind(first=0, num_layers=6, groups=(HEADS, NEURONS), parameters=300, num_bytes=600, attention_width=12)
SPARSE = LayerKind(first=0, num_layers=6, groups=(HEADS, EXPERTS), parameters=700, num_bytes=1400, attention_width=12)
LOAD = Workload(
    kinds=(DENSE,),
    kept={"neurons": 7},
    hidden=4,
    vocabulary=100,
    outer_parameters=800,
    bytes_on_disk=5200,
    output_bytes=4768,
    samples=8,
    sequence_length=16,
    shards=4,
    held_out_shards=1,
    micro_batch=2,
    workers=2,
    on_gpu=False,
    element_bytes=4,
    written_element_bytes=2,
    num_candidates=5,
    checkpoint_layers=2,
    evaluation_tokens=0,
    evaluation_window=1,
)
GPU = replace(LOAD, on_gpu=True, element_bytes=2)
WIDE = replace(DENSE, parameters=12 * 2**14 + 100, groups=(replace(NEURONS, num_units=2**14),))
BIG = replace(LOAD, hidden=4096, kinds=(WIDE,), kept={"neurons": 2**13})
BIG = replace(BIG, samples=128, sequence_length=2048, shards=8)
"""Large enough for every part to show: T 262,144, F 16,384."""


def test_tokens() -> None:
    assert (LOAD.tokens, LOAD.batch_tokens, LOAD.share_tokens) == (128, 32, 64)
    assert replace(LOAD, workers=3).share_tokens == 2 * 2 * 16  # the worker with two of the four shards
    assert replace(LOAD, samples=9, workers=4).share_tokens == 3 * 16


def test_memory_of_a_dense_layer_on_a_cpu() -> None:
    table = resources.memory_by_step(LOAD, MemoryPlan())
    standing = {"runtime": RUNTIME_BYTES, "weights": CONVERSION_BYTES, "hidden states": 2 * 64 * 4 * 4, "inputs": 64 * 10 * 4}
    assert table["collect"] == standing | {"activations": 4 * 32 * 10 * 4, "statistics": 2 * 10 * 10 * 8}  # two shards, two levels
    assert table["decide"] == standing | {"statistics": 2 * 800, "decision": 8 * (4 * 7 + 7 * 7) + 3 * 8 * 4 * 10 + 4 * 7 * 2}
    assert table["write"] == standing | {"output": 2 * (300 - 3 * 12) * 2}
    assert table["write outer"] == {"runtime": RUNTIME_BYTES, "output": 800 * 2}
    assert list(table) == ["collect", "decide", "write", "write outer"]


def test_one_process_also_holds_what_ray_would() -> None:
    table = resources.memory_by_step(replace(LOAD, in_process=True), MemoryPlan())
    assert table["decide"]["payloads"] == 2 * 800


def test_memory_on_a_gpu() -> None:
    table = resources.memory_by_step(GPU, MemoryPlan())
    assert table["collect"]["weights"] == (800 + 2 * 300) * 2
    assert list(table) == ["collect", "decide"]
    assert resources.decision_bytes(GPU, NEURONS) == Decision(max(800, 8 * (4 * 7 + 2 * 7 * 7)), 3 * 8 * 4 * 10)
    assert resources.host_bytes(GPU) == RUNTIME_BYTES + 800 * 2
    in_chunks = resources.memory_by_step(replace(GPU, placement="layers", propagation="dense"), MemoryPlan(layers_per_chunk=3))
    assert in_chunks["collect"]["weights"] == (800 + 3 * 300) * 2


def test_rows_stand_for_a_gram_matrix_where_tokens_are_few() -> None:
    few = replace(LOAD, samples=4, sequence_length=2, micro_batch=1)  # 8 tokens, 10 columns
    assert resources.in_rows(few, NEURONS)
    assert not resources.in_rows(few, HEADS)
    assert resources.statistics_bytes(few, NEURONS) == 8 * 10 * 4
    assert resources.partial_bytes(few, NEURONS) == 4 * 10 * 4
    blocks, result = 3 * 8 * 4 * 10, 4 * 7 * 2
    assert resources.decision_bytes(few, NEURONS) == Decision(8 * 4 * 7, 8 * (8 * 7 + 7 * 7 * 7) + blocks + result)
    assert resources.statistics_flops(few, NEURONS) == 0
    assert resources.selection_flops(few, NEURONS) == 4 * 8 * 8 * 10


def test_an_r_factor_stands_for_many_rows() -> None:
    exact = replace(LOAD, exact=True)
    assert resources.statistics_bytes(exact, NEURONS) == 2 * 800
    assert resources.statistics_flops(exact, NEURONS) == 2 * 128 * 100


def test_experts_see_their_part_of_the_tokens() -> None:
    load = replace(LOAD, kinds=(SPARSE,), kept={"experts": 5})
    assert resources.block_tokens(load, EXPERTS) == 64
    assert resources.statistics_bytes(load, EXPERTS) == 2 * 4 * 800
    assert resources.statistics_flops(load, EXPERTS) == 128 * 2 * 100
    assert SPARSE.active_parameters == 700 - 2 * 10 * 12
    assert load.kept_parameters(SPARSE) == 700 - 5 * 4 * 12
    assert resources.memory_by_step(load, MemoryPlan())["collect"]["inputs"] == 64 * 2 * 10 * 4


def test_layers_placement_holds_the_statistics_of_its_chunk() -> None:
    load = replace(LOAD, placement="layers", propagation="dense")
    table = resources.memory_by_step(load, MemoryPlan(layers_per_chunk=3))
    assert table["collect"]["statistics"] == 3 * 2 * 8 * 10 * 10  # the heads lose nothing: nobody watches them
    both = 2 * 8 * (6 * 6 + 10 * 10)
    table = resources.memory_by_step(replace(load, kept={"heads": 1, "neurons": 7}), MemoryPlan(layers_per_chunk=3))
    assert table["collect"]["statistics"] == 3 * both
    assert table["collect"]["hidden states"] == resources.WINDOW * 32 * 4 * 4
    assert table["collect"]["inputs"] == 0
    assert table["write"]["statistics"] == 3 * both


def test_files_take_what_does_not_fit() -> None:
    spilled = MemoryPlan(keep_inputs=False, spill_hidden=True, spill_statistics=True)
    table = resources.memory_by_step(LOAD, spilled)
    assert table["collect"]["hidden states"] == 2 * 32 * 4 * 4
    assert (table["collect"]["inputs"], table["collect"]["statistics"], table["decide"]["statistics"]) == (0, 0, 0)
    assert table["decide"]["decision"] == 3 * 8 * 4 * 10 + 4 * 7 * 2
    assert not any(choice.spill_statistics for choice in resources.choices(GPU))


def test_arithmetic() -> None:
    assert resources.forward_flops(LOAD, DENSE) == 128 * (2 * 300 + 16 * 12)
    assert resources.statistics_flops(LOAD, NEURONS) == 128 * 100
    assert resources.selection_flops(LOAD, NEURONS) == 1000 // 3
    assert resources.correction_flops(LOAD, NEURONS) == 8 * (343 // 3 + 2 * 49 * 4 + 100 * 4)
    (cost,) = resources.layer_costs(LOAD, MemoryPlan(keep_inputs=False))
    assert cost.forward_flops == 2 * resources.forward_flops(LOAD, DENSE)


def test_refit_is_a_dense_and_a_pruned_pass() -> None:
    load = replace(LOAD, placement="layers", propagation="refit")
    (cost,) = resources.layer_costs(load, MemoryPlan())
    assert cost.forward_flops == 2 * resources.forward_flops(LOAD, DENSE)
    assert cost.statistics_flops == 128 * 2 * 100
    assert (cost.selection_flops, cost.correction_flops) == (333, resources.correction_flops(LOAD, NEURONS))
    assert cost.written_bytes == (300 - 3 * 12) * 2
    assert cost.read_bytes == 3 * 600
    table = resources.memory_by_step(load, MemoryPlan())
    assert list(table) == ["collect", "decide", "refit, collect", "refit, decide", "refit, write", "write outer"]
    assert [choice.layers_per_chunk for choice in resources.choices(load)] == [3, 2, 1] * 4
    stages = resources.stages(load, MemoryPlan(), PROFILES["cpu-core"])
    assert [stage.name for stage in stages] == list(resources.STAGES)


def test_messages_of_shards() -> None:
    """Training shards 0-2, held-out shard 3. The decider has shards 0-1; nodes 2 and 3 come from the other worker."""
    (cost,) = resources.layer_costs(LOAD, MemoryPlan())
    assert cost.message_bytes == 2 * 800 + 4 * 7 * 2
    assert cost.num_messages == 2
    assert cost.read_bytes == 2 * 600
    (alone,) = resources.layer_costs(replace(LOAD, workers=1), MemoryPlan())
    assert (alone.num_messages, alone.message_bytes) == (0, 0)


def test_statistics_are_merged_in_pairs() -> None:
    load = replace(LOAD, shards=8, workers=8)
    assert resources.reduction_levels(load) == [[range(n, n + 1) for n in (1, 3, 5, 7)], [range(2, 4), range(6, 8)], [range(4, 8)]]
    assert resources.reduction_levels(replace(load, workers=3)) == [[range(2, 5)], [range(5, 8)]]
    assert resources.reduction_levels(replace(load, workers=1)) == []


def test_messages_of_layers() -> None:
    load = replace(LOAD, placement="layers", propagation="dense")
    (cost,) = resources.layer_costs(load, MemoryPlan(layers_per_chunk=3))
    assert cost.message_bytes == -(-128 * 4 * 4 // 6)  # one boundary, spread over six layers
    assert cost.read_bytes == 600
    assert resources.checkpoint_bytes(load, MemoryPlan(layers_per_chunk=3)) == 0
    assert resources.checkpoint_bytes(load, MemoryPlan(layers_per_chunk=1)) == 2 * 128 * 4 * 4
    assert resources.checkpoint_bytes(LOAD, MemoryPlan()) == 2 * 128 * 4 * 4
    assert resources.checkpoint_bytes(replace(LOAD, checkpoint_layers=0), MemoryPlan()) == 0


PATHS = [("shards", "pruned"), ("layers", "dense"), ("layers", "refit")]


@pytest.mark.parametrize(("placement", "propagation"), PATHS)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_more_tokens_never_need_less_memory(placement: Any, propagation: Any, on_gpu: bool) -> None:
    changes: dict[str, Any] = {"placement": placement, "propagation": propagation, "on_gpu": on_gpu}
    loads = [replace(BIG, samples=samples, **changes) for samples in range(8, 200, 7)]
    sizes = [resources.peak_bytes(load, MemoryPlan()) for load in loads]
    assert all(less <= more for less, more in pairwise(sizes))


def test_more_workers_never_need_more_memory() -> None:
    sizes = [resources.peak_bytes(replace(BIG, workers=workers), MemoryPlan()) for workers in range(1, 9)]
    assert all(more <= less for less, more in pairwise(sizes))


def test_choices_are_taken_in_order() -> None:
    peaks = [resources.peak_bytes(BIG, choice) for choice in resources.choices(BIG)]
    assert all(more >= less for more, less in pairwise(peaks))
    for choice, peak in zip(resources.choices(BIG), peaks, strict=True):
        assert resources.choose_memory(BIG, peak) == choice
    chunked = replace(BIG, placement="layers", propagation="dense")
    assert resources.choose_memory(chunked, None).layers_per_chunk == 3
    two = resources.peak_bytes(chunked, MemoryPlan(layers_per_chunk=2))
    assert resources.choose_memory(chunked, two) == MemoryPlan(layers_per_chunk=2)


def test_refusals_say_need_have_and_what_would_help() -> None:
    least = resources.peak_bytes(BIG, list(resources.choices(BIG))[-1])
    with pytest.raises(ResourceError) as caught:
        resources.choose_memory(BIG, least - 1)
    message = str(caught.value)
    assert f"needs at least {resources.gib(least)} (step " in message
    assert f"it may use {resources.gib(least - 1)}; raise memory.worker to {resources.gib(least)}" in message
    attention_bound = replace(BIG, workers=1, micro_batch=32)
    limit = resources.peak_bytes(replace(attention_bound, micro_batch=1), list(resources.choices(BIG))[-1])
    with pytest.raises(ResourceError, match=r"lower parallel\.micro_batch to 1"):
        resources.choose_memory(attention_bound, limit)


def test_fewest_workers() -> None:
    two = resources.peak_bytes(replace(BIG, workers=2), MemoryPlan())
    assert resources.fewest_workers(replace(BIG, workers=8), two, keep_all=True) == 2
    assert resources.fewest_workers(BIG, two) == 1
    assert resources.fewest_workers(BIG, RUNTIME_BYTES) is None


def test_times_need_a_machine() -> None:
    assert all(stage.seconds is None for stage in resources.stages(BIG, MemoryPlan(), None))
    timed = resources.stages(BIG, MemoryPlan(), PROFILES["cpu-core"])
    assert all(stage.seconds is not None and stage.seconds >= 0 for stage in timed)
    seconds = {stage.name: stage for stage in timed}
    selection = 6 * (2**14) ** 3 // 3
    assert seconds["selection"].flops == pytest.approx(selection)
    assert seconds["selection"].seconds == pytest.approx(selection / 25e9, rel=1e-6)
    assert seconds["selection"].bound_by == "arithmetic"


def test_files_take_disk_time() -> None:
    spilled = MemoryPlan(keep_inputs=False, spill_hidden=True, spill_statistics=True)
    assert resources.spilled_bytes(LOAD, spilled) == 2 * 6 * 1600 + 2 * 6 * 128 * 4 * 4
    seconds = {stage.name: stage.seconds for stage in resources.stages(LOAD, spilled, PROFILES["cpu-core"])}
    assert seconds["files"] == pytest.approx((2 * 6 * 1600 + 6 * 128 * 4 * 4) / 0.5e9)  # hidden states are spread over two workers
    assert next(stage.seconds for stage in resources.stages(LOAD, MemoryPlan(), PROFILES["cpu-core"]) if stage.name == "files") == 0


def test_decisions_run_at_the_same_time_where_workers_own_layers() -> None:
    def seconds(load: Workload) -> dict[str, float | None]:
        choice = resources.choose_memory(load, None)
        return {stage.name: stage.seconds for stage in resources.stages(load, choice, PROFILES["h100-80gb"])}

    shards, layers = seconds(replace(BIG, workers=6)), seconds(replace(BIG, workers=6, placement="layers", propagation="dense"))
    assert shards["selection"] == pytest.approx(6 * layers["selection"])  # type: ignore[operator]
