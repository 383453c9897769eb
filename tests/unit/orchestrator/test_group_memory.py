"""Bytes of statistics and of decisions, on a case small enough for a pencil."""

from dataclasses import replace

from rayprune.orchestrator.planning.group_memory import (
    Decision,
    decision_bytes,
    exchanged_bytes,
    partial_bytes,
    statistics_bytes,
)
from rayprune.specs.methods.ranking import RANKINGS
from tests.unit.orchestrator.workloads import EXACT, EXPERTS, FEW, GPU, LOAD, MIXTURE, NEURONS


def test_a_decision_on_a_gpu() -> None:
    assert decision_bytes(GPU, NEURONS) == Decision(
        max(800, 8 * (2 * 4 * 7 + 2 * 7 * 7)), 3 * 8 * 4 * 10
    )


def test_rows_stand_for_a_gram_matrix_where_tokens_are_few() -> None:
    assert statistics_bytes(FEW, NEURONS) == 8 * 10 * 4
    assert partial_bytes(FEW, NEURONS) == 4 * 10 * 4
    blocks, result = 3 * 8 * 4 * 10, 4 * 7 * 2
    assert decision_bytes(FEW, NEURONS) == Decision(
        8 * 4 * 7, 8 * (8 * 7 + 7 * 7 * 7) + blocks + result
    )


def test_an_exchange_holds_one_matrix_more_than_a_collection() -> None:
    assert exchanged_bytes(LOAD, NEURONS) == partial_bytes(LOAD, NEURONS) + 10 * 10 * 8
    assert exchanged_bytes(FEW, NEURONS) == statistics_bytes(FEW, NEURONS)


def test_an_r_factor_stands_for_many_rows() -> None:
    assert statistics_bytes(EXACT, NEURONS) == 2 * 800


def test_statistics_of_one_expert_are_held_at_a_time() -> None:
    assert statistics_bytes(MIXTURE, EXPERTS) == 2 * 800


def test_ranking_takes_what_the_method_does() -> None:
    for method, numbers in {
        "stat": 10 * 10,
        "obs": 10 * (10 + 4),
        "numerical": 10 * 10,
        "flap": 0,
    }.items():
        load = replace(LOAD, ranking=RANKINGS[method].model_validate({}), corrects=False)
        assert decision_bytes(load, NEURONS) == Decision(8 * numbers, 0)
    for method, numbers in {
        "stat": 8 * 10,
        "obs": 10 * (10 + 10 + 4),
        "numerical": 2 * 10 * 10,
        "wanda": 0,
    }.items():
        load = replace(FEW, ranking=RANKINGS[method].model_validate({}), corrects=False)
        assert decision_bytes(load, NEURONS) == Decision(8 * numbers, 0)
