"""Memory of a worker by step, on a case small enough for a pencil."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from rayprune.orchestrator.planning.worker_memory import (
    HELD_APART,
    RUNTIME_BYTES,
    host_bytes,
    memory_by_step,
    peak_bytes,
)
from rayprune.orchestrator.planning.workload import MICRO_BATCHES_AT_ONCE, TrainingLoad
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.blocks import CONVERTED_BYTES
from rayprune.workers.store.layout import RECOVER_TASK
from tests.unit.orchestrator.workloads import BIG, GPU, LAYERS, LOAD, MIXTURE, REFIT


def test_memory_of_a_dense_layer_on_a_cpu() -> None:
    table = memory_by_step(LOAD, MemoryPlan())
    standing = {
        "runtime": RUNTIME_BYTES,
        "weights": CONVERTED_BYTES,
        "hidden states": 2 * 64 * 4 * 4,
        "inputs": 64 * 10 * 4,
    }
    beside = {"output": (300 - 3 * 12) * 2}  # the layer below is written meanwhile
    # two shards, two levels
    assert table["collect"] == standing | beside | {
        "activations": 4 * 32 * 10 * 4,
        "statistics": 2 * 10 * 10 * 8,
    }
    assert table["decide"] == standing | beside | {
        "statistics": 2 * 800,
        "decision": 8 * (2 * 4 * 7 + 7 * 7) + 3 * 8 * 4 * 10 + 4 * 7 * 2,
    }
    assert table["write"] == standing | {"output": 2 * (300 - 3 * 12) * 2}
    assert table["write outer"] == {"runtime": RUNTIME_BYTES, "output": 800 * 2}
    assert list(table) == ["collect", "decide", "write", "write outer"]


def test_one_process_keeps_what_predictions_are_made_from() -> None:
    alone = replace(LOAD, in_process=True)
    assert "probe" not in memory_by_step(alone, MemoryPlan())["decide"]
    table = memory_by_step(replace(alone, probes=True), MemoryPlan())
    assert table["decide"]["probe"] == 2 * 800


def test_memory_on_a_gpu() -> None:
    table = memory_by_step(GPU, MemoryPlan())
    assert table["collect"]["weights"] == (800 + 2 * 300) * 2
    assert list(table) == ["collect", "decide"]
    assert host_bytes(GPU) == RUNTIME_BYTES + 800 * 2
    in_chunks = memory_by_step(
        replace(GPU, placement="layers", propagation="dense"), MemoryPlan(layers_per_chunk=3)
    )
    assert in_chunks["collect"]["weights"] == (800 + 3 * 300) * 2


def test_experts_take_what_they_read_again_and_one_after_the_other() -> None:
    collect = memory_by_step(MIXTURE, MemoryPlan())["collect"]
    assert collect["inputs"] == 64 * 6 * 4, "those of the heads"
    # all of 32 tokens, twice an even share, are as many as there are
    assert collect["activations"] == 6 * 32 * 10 * 4
    assert collect["cuts"] == 4 * (4 * 5 * 4)


def test_layers_placement_holds_the_statistics_of_its_chunk() -> None:
    table = memory_by_step(LAYERS, MemoryPlan(layers_per_chunk=3))
    # the heads lose nothing: nobody watches them
    assert table["collect"]["statistics"] == 3 * 2 * 8 * 10 * 10
    both = 2 * 8 * (6 * 6 + 10 * 10)
    table = memory_by_step(
        replace(LAYERS, kept={"heads": 1, "neurons": 7}), MemoryPlan(layers_per_chunk=3)
    )
    assert table["collect"]["statistics"] == 3 * both
    assert table["collect"]["hidden states"] == MICRO_BATCHES_AT_ONCE * 32 * 4 * 4
    assert table["collect"]["inputs"] == 0
    assert table["write"]["statistics"] == 3 * both


def test_rows_that_become_an_r_factor_take_its_qr_too() -> None:
    rows = 10 + 32  # a factor and a micro-batch, which is more than two factors
    exact = replace(LOAD, exact=True)
    assert memory_by_step(exact, MemoryPlan())["collect"]["factorisation"] == 8 * 10 * (
        2 * rows + 2 * 10
    )
    assert memory_by_step(exact, MemoryPlan(spill_statistics=True))["collect"][
        "factorisation"
    ] == 8 * 10 * (rows + 2 * 10)


def test_files_take_what_does_not_fit() -> None:
    table = memory_by_step(
        LOAD, MemoryPlan(keep_inputs=False, spill_hidden=True, spill_statistics=True)
    )
    assert table["collect"]["hidden states"] == 2 * 32 * 4 * 4
    assert (
        table["collect"]["inputs"],
        table["collect"]["statistics"],
        table["decide"]["statistics"],
    ) == (0, 0, 0)
    assert table["decide"]["decision"] == 3 * 8 * 4 * 10 + 4 * 7 * 2


def test_refit_has_the_steps_of_both_passes() -> None:
    table = memory_by_step(REFIT, MemoryPlan())
    assert list(table) == [
        "collect",
        "decide",
        "refit, collect",
        "refit, decide",
        "refit, write",
        "write outer",
    ]


PATHS = [("shards", "pruned"), ("layers", "dense"), ("layers", "refit")]


@pytest.mark.parametrize(("placement", "propagation"), PATHS)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_more_tokens_never_need_less_memory(placement: Any, propagation: Any, on_gpu: bool) -> None:
    changes: dict[str, Any] = {"placement": placement, "propagation": propagation, "on_gpu": on_gpu}
    loads = [replace(BIG, samples=samples, **changes) for samples in range(8, 200, 7)]
    sizes = [peak_bytes(load, MemoryPlan()) for load in loads]
    assert all(less <= more for less, more in pairwise(sizes))


def test_more_workers_never_need_more_memory() -> None:
    sizes = [peak_bytes(replace(BIG, workers=workers), MemoryPlan()) for workers in range(1, 9)]
    assert all(more <= less for less, more in pairwise(sizes))


def test_drift_holds_the_dense_streams_and_its_product() -> None:
    table, plain = (
        memory_by_step(load, MemoryPlan()) for load in (replace(LOAD, drift=True), LOAD)
    )
    assert table["collect"]["hidden states"] == 5 * 64 * 4 * 4
    assert table["collect"]["statistics"] == 2 * 10 * (10 + 4) * 8
    assert table["decide"]["statistics"] == 2 * 10 * (10 + 4) * 8
    assert table["decide"]["decision"] == plain["decide"]["decision"]


def test_gradients_take_a_layer_and_one_window() -> None:
    load = replace(LOAD, gradient_windows=5)
    table = memory_by_step(load, MemoryPlan())
    assert table["gradients"] == {
        "runtime": RUNTIME_BYTES,
        "weights": CONVERTED_BYTES + 4 * 300,
        "hidden states": 3 * 16 * 4 * 4,
        "squares": (3 + 1) * 8 * 6 * (2 * 3 + 10),
        "activations": 16 * 100 * (4 + 12),
    }
    long = memory_by_step(replace(load, vocabulary=1), MemoryPlan())["gradients"]
    assert long["activations"] == 12 * 16 * (7 * 4 + 3 * 10)
    assert (
        memory_by_step(replace(GPU, gradient_windows=5), MemoryPlan())["gradients"]["weights"]
        == (800 + 2 * 300) * 2
    )
    assert "gradients" not in memory_by_step(LOAD, MemoryPlan())


def test_a_training_is_spread_over_the_ranks() -> None:
    training = TrainingLoad(
        windows=2, keeps_activations=False, pass_bytes=2, sequence_length=LOAD.sequence_length
    )
    load = replace(LOAD, trainings=(training,), workers=2)
    parameters = 800 + 6 * 300
    table = memory_by_step(load, MemoryPlan())["train"]
    tokens = 2 * load.sequence_length
    assert table == {
        "runtime": RUNTIME_BYTES,
        "weights": 4 * parameters // 2 + 2 * (2 * 300 + 800),
        "optimizer": 12 * (parameters // 2) + 8 * load.vocabulary * load.hidden,
        "hidden states": 4 * 6 * tokens * 4,
        "activations": 6 * tokens * (7 * 4 + 3 * 10),
        "scores": 16 * tokens * load.vocabulary,
    }
    taught = memory_by_step(
        replace(load, trainings=(replace(training, teacher=True),)), MemoryPlan()
    )["train"]
    assert taught["weights"] == (4 + 2) * parameters // 2 + 2 * (2 * 300 + 800)
    assert taught["scores"] == 22 * tokens * load.vocabulary
    alone = memory_by_step(replace(load, workers=1), MemoryPlan())["train"]
    assert (alone["weights"], alone["optimizer"]) == (
        4 * parameters,
        12 * parameters + 8 * load.vocabulary * load.hidden,
    )


def test_adapters_are_whole_on_every_rank_beside_narrow_weights() -> None:
    kinds = tuple(replace(kind, matrix_sides=50) for kind in LOAD.kinds)
    training = TrainingLoad(
        windows=1,
        keeps_activations=False,
        pass_bytes=2,
        sequence_length=LOAD.sequence_length,
        lora_rank=3,
    )
    table = memory_by_step(
        replace(LOAD, kinds=kinds, trainings=(training,), workers=2), MemoryPlan()
    )["train"]
    adapters = 3 * 6 * 50
    assert table["weights"] == 2 * (800 + 6 * 300) // 2 + 2 * (2 * 300 + 800) + 4 * adapters
    assert table["optimizer"] == 12 * adapters


def test_a_layer_trained_alone_takes_the_state_of_one_layer() -> None:
    training = TrainingLoad(
        windows=1,
        keeps_activations=False,
        pass_bytes=4,
        sequence_length=LOAD.sequence_length,
        each_layer=True,
    )
    table = memory_by_step(replace(LOAD, trainings=(training,), workers=2), MemoryPlan())
    assert "train" not in table
    assert table["train layer"]["weights"] == CONVERTED_BYTES + 4 * 300
    assert table["train layer"]["optimizer"] == 12 * 300 + 2 * 4 * 4 * 10
    narrow = memory_by_step(
        replace(LOAD, trainings=(replace(training, pass_bytes=2),)), MemoryPlan()
    )["train layer"]
    assert (narrow["weights"], narrow["optimizer"]) == (
        CONVERTED_BYTES + 6 * 300,
        12 * 300 + 6 * 4 * 10,
    )
    held = table["train layer"]["activations"]
    assert held == pytest.approx(HELD_APART * narrow["activations"], abs=1)
    on_gpu = memory_by_step(replace(GPU, trainings=(training,)), MemoryPlan(layers_per_chunk=2))
    assert on_gpu["train layer"]["weights"] == (800 + 2 * 300) * 2 + 4 * 300


def test_a_layer_recovered_alone_has_the_dense_one_beside_it() -> None:
    training = TrainingLoad(
        windows=1,
        keeps_activations=False,
        pass_bytes=2,
        sequence_length=LOAD.sequence_length,
        teacher=True,
        each_layer=True,
        task=RECOVER_TASK,
        keeps_best=True,
    )
    kinds = tuple(replace(kind, matrix_sides=50) for kind in LOAD.kinds)
    load = replace(LOAD, kinds=kinds)
    kept = max(map(load.kept_parameters, kinds))
    assert kept < 300
    tables = [
        memory_by_step(replace(load, trainings=(replace(training, lora_rank=rank),)), MemoryPlan())
        for rank in (0, 3)
    ]
    whole, adapters = (table["train layer"] for table in tables)
    assert whole["weights"] == 2 * CONVERTED_BYTES + (4 + 2 + 4) * kept
    assert whole["optimizer"] == 12 * kept + 6 * 4 * 10
    assert adapters["weights"] == 2 * CONVERTED_BYTES + 2 * kept + (4 + 4) * 3 * 50
    assert adapters["optimizer"] == 12 * 3 * 50


@pytest.mark.parametrize(
    ("most", "workers", "spill", "on_gpu", "windows"),
    [
        (None, 1, False, False, 4),
        (None, 8, False, True, 64),
        (10, 2, False, True, 5),
        (6, 2, False, False, 3),
        (900, 2, False, True, 64),
        (None, 1, True, False, 1),
    ],
)
def test_evaluation_holds_the_windows_that_go_together(
    most: int | None, workers: int, spill: bool, on_gpu: bool, windows: int
) -> None:
    """Under two models, however long the text is, and however few samples are calibrated on."""
    load = replace(
        LOAD,
        evaluation_tokens=32,
        evaluation_window=16,
        most_evaluated=most,
        workers=workers,
        on_gpu=on_gpu,
    )
    kinds = memory_by_step(load, MemoryPlan(spill_hidden=spill))["evaluate"]
    assert kinds["hidden states"] == 2 * windows * 16 * load.hidden * load.element_bytes
