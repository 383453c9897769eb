"""What follows from a workload alone."""

from dataclasses import replace

from rayprune.orchestrator.planning.workload import block_tokens, in_rows, num_chunks, num_waves
from rayprune.specs.memory import MemoryPlan
from tests.unit.orchestrator.workloads import (
    EXPERTS,
    FEW,
    HEADS,
    LAYERS,
    LOAD,
    MIXTURE,
    NEURONS,
    SPARSE,
)


def test_tokens() -> None:
    assert (LOAD.tokens, LOAD.batch_tokens, LOAD.share_tokens) == (128, 32, 64)
    # the worker with two of the four shards
    assert replace(LOAD, workers=3).share_tokens == 2 * 2 * 16
    assert replace(LOAD, samples=9, workers=4).share_tokens == 3 * 16


def test_rows_stand_for_a_gram_matrix_where_tokens_are_few() -> None:
    assert in_rows(FEW, NEURONS)
    assert not in_rows(FEW, HEADS)


def test_experts_see_their_part_of_the_tokens() -> None:
    assert block_tokens(MIXTURE, EXPERTS) == 64
    assert SPARSE.active_parameters == 700 - 2 * 10 * 12
    assert MIXTURE.kept_parameters(SPARSE) == 700 - 5 * 4 * 12


def test_chunks_keep_all_workers_busy_in_every_wave() -> None:
    sizes = [
        (num_chunks(LAYERS, choice), num_waves(LAYERS, choice))
        for choice in (MemoryPlan(layers_per_chunk=n) for n in (3, 2, 1))
    ]
    assert sizes == [(2, 1), (4, 2), (6, 3)]  # six layers, two workers
