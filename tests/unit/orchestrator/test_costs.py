"""Arithmetic, messages and disk of the layer tasks, on a case small enough for a pencil."""

from dataclasses import replace

from rayprune.orchestrator.planning.costs import (
    checkpoint_bytes,
    correction_flops,
    forward_flops,
    layer_costs,
    selection_flops,
    spilled_bytes,
    statistics_flops,
)
from rayprune.orchestrator.planning.workload import TrainingLoad, Workload
from rayprune.specs.memory import MemoryPlan
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.workers.store.layout import RECOVER_TASK
from tests.unit.orchestrator.workloads import (
    DENSE,
    EXACT,
    EXPERTS,
    FEW,
    LAYERS,
    LOAD,
    MIXTURE,
    NEURONS,
    REFIT,
)


def test_arithmetic() -> None:
    assert forward_flops(LOAD, DENSE) == 128 * (2 * 300 + 16 * 12)
    assert statistics_flops(LOAD, NEURONS) == 128 * 100
    assert selection_flops(LOAD, NEURONS) == 1000 // 3
    assert correction_flops(LOAD, NEURONS) == 6 * (343 // 3 + 2 * 49 * 4) + (
        5 * 49 * 4 + 2 * 100 * 4 + 2 * 9 * 4
    )
    (cost,) = layer_costs(LOAD, MemoryPlan(keep_inputs=False))
    assert cost.forward_flops == 2 * forward_flops(LOAD, DENSE)


def test_rows_stand_for_a_gram_matrix_where_tokens_are_few() -> None:
    assert statistics_flops(FEW, NEURONS) == 0
    assert selection_flops(FEW, NEURONS) == 4 * 8 * 8 * 10


def test_an_r_factor_stands_for_many_rows() -> None:
    assert statistics_flops(EXACT, NEURONS) == 2 * 128 * 100


def test_a_token_counts_in_the_experts_it_passes_through() -> None:
    assert statistics_flops(MIXTURE, EXPERTS) == 128 * 2 * 100


def test_refit_is_a_dense_and_a_pruned_pass() -> None:
    (cost,) = layer_costs(REFIT, MemoryPlan())
    assert cost.forward_flops == 2 * forward_flops(LOAD, DENSE)
    assert cost.statistics_flops == 128 * 2 * 100
    assert (cost.selection_flops, cost.correction_flops) == (333, correction_flops(LOAD, NEURONS))
    assert cost.written_bytes == (300 - 3 * 12) * 2
    assert cost.read_bytes == 3 * 600


def test_a_task_of_shards_is_done_by_all_workers() -> None:
    (cost,) = layer_costs(LOAD, MemoryPlan())
    assert cost.message_bytes == 2 * 800 + 4 * 7 * 2
    assert cost.num_messages == 2
    assert cost.read_bytes == 2 * 600
    (alone,) = layer_costs(replace(LOAD, workers=1), MemoryPlan())
    assert (alone.num_messages, alone.message_bytes) == (0, 0)


def test_a_task_of_layers_is_done_by_one_worker() -> None:
    (cost,) = layer_costs(LAYERS, MemoryPlan(layers_per_chunk=3))
    assert cost.message_bytes == -(-128 * 4 * 4 // 6)
    assert cost.read_bytes == 600


def test_hidden_states_are_saved_between_waves_or_every_so_many_layers() -> None:
    assert checkpoint_bytes(LAYERS, MemoryPlan(layers_per_chunk=3)) == 0
    assert checkpoint_bytes(LAYERS, MemoryPlan(layers_per_chunk=1)) == 2 * 128 * 4 * 4
    assert checkpoint_bytes(LOAD, MemoryPlan()) == 2 * 128 * 4 * 4
    assert checkpoint_bytes(replace(LOAD, checkpoint_layers=0), MemoryPlan()) == 0


def test_files_instead_of_memory_are_written_and_read() -> None:
    spilled = MemoryPlan(keep_inputs=False, spill_hidden=True, spill_statistics=True)
    assert spilled_bytes(LOAD, spilled) == 2 * 6 * 1600 + 2 * 6 * 128 * 4 * 4
    assert (
        spilled_bytes(replace(LOAD, gradient_windows=3), MemoryPlan()) == 2 * 6 * (3 * 16) * 4 * 4
    )
    alone = TrainingLoad(
        windows=1,
        keeps_activations=False,
        pass_bytes=4,
        sequence_length=LOAD.sequence_length,
        each_layer=True,
        streamed_windows=8,
    )
    assert spilled_bytes(replace(LOAD, trainings=(alone,)), MemoryPlan()) == 2 * 2 * 6 * 128 * 4 * 4
    recovered = replace(LAYERS, trainings=(replace(alone, task=RECOVER_TASK, streamed_windows=5),))
    between = 2 * (128 + 5 * LOAD.sequence_length) * 4 * 4
    assert checkpoint_bytes(recovered, MemoryPlan(layers_per_chunk=1)) == between


def test_ranking_costs_what_the_method_does() -> None:
    def flops(method: str, load: Workload = LOAD) -> int:
        options = RANKINGS[method].model_validate({})
        return selection_flops(replace(load, ranking=options), NEURONS)

    assert flops("stat") == 10**3 // 3
    assert flops("obs") == 10**3 + 2 * 3 * 10 * (10 + 4)
    # rows become a Gram matrix
    assert flops("obs", FEW) == 2 * 8 * 10**2 + 10**3 + 2 * 3 * 10 * (10 + 4)
    assert flops("numerical") == 2 * 4 * 10**2 + 10**3 // 3
    assert flops("flap") == flops("wanda") == 0


def test_drift_has_a_dense_path_beside_the_pruned_one_and_corrects_every_group() -> None:
    (cost,), (plain,) = (
        layer_costs(replace(LOAD, drift=True), MemoryPlan()),
        layer_costs(LOAD, MemoryPlan()),
    )
    assert cost.forward_flops == 2 * plain.forward_flops
    assert cost.statistics_flops == 128 * (6 * (6 + 4 * 4) + 10 * (10 + 4 * 4))
    assert cost.statistics_bytes == 2 * 8 * (6 * (6 + 4) + 10 * (10 + 4))
    assert cost.selection_flops == plain.selection_flops
    assert cost.correction_flops > plain.correction_flops
    assert layer_costs(replace(LAYERS, drift=True), MemoryPlan()) == layer_costs(
        LAYERS, MemoryPlan()
    ), "nothing drifts on the dense path"
