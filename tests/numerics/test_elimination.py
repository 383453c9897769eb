"""The sweep operator and greedy elimination against least squares written out."""

import itertools

import pytest
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.numerics.elimination import Elimination
from rayprune.workers.numerics.linalg import inverse_
from tests.helpers import SCRATCH

WIDTH, HIDDEN, RIDGE = 12, 5, 0.25


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gram matrix and weight."""
    generator = torch.Generator().manual_seed(seed)
    z_TF = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64) @ torch.randn(
        WIDTH, WIDTH, generator=generator, dtype=torch.float64
    )
    return z_TF.T @ z_TF, torch.randn(HIDDEN, WIDTH, generator=generator, dtype=torch.float64)


def damped(gram_FF: Tensor) -> Tensor:
    return gram_FF + RIDGE * torch.eye(WIDTH, dtype=torch.float64)


def refit(gram_FF: Tensor, weight_DF: Tensor, kept: list[int]) -> tuple[float, Tensor]:
    """Objective and weight of the best refit on the kept columns, from its definition."""
    damped_FF = damped(gram_FF)
    target_FD = damped_FF @ weight_DF.T
    weight_KD = torch.linalg.solve(damped_FF[kept][:, kept], target_FD[kept])
    full = torch.zeros(WIDTH, len(weight_DF), dtype=torch.float64)
    full[kept] = weight_KD
    change = full - weight_DF.T
    return float((change * (damped_FF @ change)).sum()), weight_KD


def columns_of(units: list[int], columns: int) -> list[int]:
    return [unit * columns + column for unit in units for column in range(columns)]


def start(gram_FF: Tensor, weight_DF: Tensor, columns: int) -> Elimination:
    return Elimination.of(gram_FF, weight_DF, columns, RIDGE, SCRATCH)


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_changes_are_exact_whatever_went_and_came_back(columns: int, seed: int) -> None:
    gram_FF, weight_DF = problem(seed)
    state, units = start(gram_FF, weight_DF, columns), WIDTH // columns
    kept = set(range(units))
    for flipped in ([0], [2, 1], [0], [1], [0]):
        state.flip_(torch.tensor(flipped))
        kept ^= set(flipped)
        objective, weight_KD = refit(gram_FF, weight_DF, columns_of(sorted(kept), columns))
        torch.testing.assert_close(
            state.weight_FD[columns_of(sorted(kept), columns)], weight_KD, rtol=1e-9, atol=1e-9
        )
        assert state.kept_U.nonzero().flatten().tolist() == sorted(kept)
        for unit, change in enumerate(state.changes().tolist()):
            after = (
                refit(gram_FF, weight_DF, columns_of(sorted(kept ^ {unit}), columns))[0]
                if kept != {unit}
                else None
            )
            assert after is None or change == pytest.approx(abs(after - objective), rel=1e-8)


@pytest.mark.parametrize("columns", [1, 3])
def test_all_units_back_is_the_beginning(columns: int) -> None:
    gram_FF, weight_DF = problem()
    state = start(gram_FF, weight_DF, columns)
    for units in ([1, 2], [2], [1]):
        state.flip_(torch.tensor(units))
    torch.testing.assert_close(
        -state.matrix_FF, torch.linalg.inv(damped(gram_FF)), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(state.weight_FD, weight_DF.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_one_at_a_time_is_greedy_by_brute_force(columns: int, seed: int) -> None:
    gram_FF, weight_DF = problem(seed)
    units, expected = list(range(WIDTH // columns)), []
    while len(units) > 2:
        losses = {
            unit: refit(gram_FF, weight_DF, columns_of([u for u in units if u != unit], columns))[0]
            for unit in units
        }
        expected.append(min(losses, key=losses.__getitem__))
        units.remove(expected[-1])
    assert start(gram_FF, weight_DF, columns).removal_order(2, 100) == expected


@pytest.mark.parametrize("seed", range(6))
def test_swaps_only_help_and_end_where_no_best_return_does(seed: int) -> None:
    gram_FF, weight_DF = problem(seed)
    state = start(gram_FF, weight_DF, 1)
    state.removal_order(6, 1)  # one crude round, so that there is something to repair
    before = refit(gram_FF, weight_DF, state.kept_U.nonzero().flatten().tolist())[0]
    state.swap_(50)
    kept = state.kept_U.nonzero().flatten().tolist()
    after = refit(gram_FF, weight_DF, kept)[0]
    assert len(kept) == 6
    assert after <= before * (1 + 1e-12)
    best = min(
        refit(gram_FF, weight_DF, list(chosen))[0]
        for chosen in itertools.combinations(range(WIDTH), 6)
    )
    assert best <= after * (1 + 1e-12)
    assert state.swap_(50) == 0


def test_inverse_in_place() -> None:
    gram_FF, _ = problem()
    expected = torch.linalg.inv(gram_FF)
    assert torch.allclose(inverse_(gram_FF), expected, rtol=1e-9)
    with pytest.raises(ModelError, match="singular"):
        inverse_(torch.zeros(3, 3, dtype=torch.float64))
