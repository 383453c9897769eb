"""Gram matrices, tall-skinny QR, pivoting and solvers, against numpy, LAPACK on Z itself, and
explicit projections.
"""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.numerics import linalg, pivoting
from tests.helpers import SCRATCH


def activations(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated columns of unlike size, fp64, well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    mixing = torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return base @ mixing * (torch.rand(width, generator=generator, dtype=torch.float64) + 0.5)


def scales(width: int, seed: int = 1) -> Tensor:
    return (
        torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.25
    )


def r_of(z_TF: Tensor) -> Tensor:
    return linalg.r_factor(z_TF)


def by_gram(z_TF: Tensor, scale_F: Tensor) -> list[int]:
    return pivoting.pivot_gram(z_TF.T @ z_TF, scale_F, len(scale_F), SCRATCH).tolist()


def by_panels(z_TF: Tensor, scale_F: Tensor) -> list[int]:
    """What a GPU does."""
    gram_FF = (z_TF.T @ z_TF) * scale_F[:, None] * scale_F
    energy_F = torch.diagonal(gram_FF).clone()
    return pivoting.by_energy(
        pivoting.cholesky_pivots_(gram_FF, len(scale_F)), energy_F, len(scale_F)
    ).tolist()


def by_r(z_TF: Tensor, scale_F: Tensor) -> list[int]:
    return pivoting.pivot_rows([r_of(z_TF)], scale_F, len(scale_F), SCRATCH).tolist()


def by_rows(z_TF: Tensor, scale_F: Tensor) -> list[int]:
    return pivoting.pivot_rows([z_TF], scale_F, len(scale_F), SCRATCH).tolist()


ALL = [by_gram, by_panels, by_r, by_rows]


def blocks_by_gram(z_TF: Tensor, scale_F: Tensor, block: int, count: int) -> list[int]:
    return pivoting.pivot_blocks_gram(z_TF.T @ z_TF, scale_F, block, count).tolist()


def blocks_by_r(z_TF: Tensor, scale_F: Tensor, block: int, count: int) -> list[int]:
    return pivoting.pivot_blocks_rows(r_of(z_TF), scale_F, block, count).tolist()


def greedy_blocks(z_TF: Tensor, scale_F: Tensor, block: int, count: int) -> list[int]:
    """Each time the block with the most energy left after projecting on all columns taken so far,
    by least squares on Z.
    """
    scaled = (z_TF * scale_F).numpy()
    taken: list[int] = []
    for _ in range(count):
        columns = [unit * block + offset for unit in taken for offset in range(block)]
        rest = (
            scaled - scaled[:, columns] @ np.linalg.lstsq(scaled[:, columns], scaled, rcond=None)[0]
            if taken
            else scaled
        )
        energies = [
            (rest[:, unit * block : (unit + 1) * block] ** 2).sum()
            for unit in range(scaled.shape[1] // block)
        ]
        taken.append(
            max(
                (unit for unit in range(len(energies)) if unit not in taken),
                key=lambda unit: (energies[unit], -unit),
            )
        )
    return taken


@pytest.mark.parametrize("width", [1, 5, 512, 513, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_equals_the_product_in_fp64(width: int, dtype: torch.dtype) -> None:
    batches = [
        activations(tokens, 8, seed).repeat(1, 88)[:, :width].to(dtype)
        for seed, tokens in enumerate((9, 1, 16))
    ]
    gram = torch.zeros(width, width, dtype=torch.float64)
    for z_TF in batches:
        linalg.add_gram_(gram, z_TF)
    assert linalg.mirror_(gram) is gram
    z_TF = torch.cat(batches).double()
    assert torch.equal(gram, gram.T)
    assert bool(((gram - z_TF.T @ z_TF).abs() <= 16 * 2**-24 * (z_TF.abs().T @ z_TF.abs())).all())


def test_gram_is_summed_in_fp64() -> None:
    gram = torch.zeros(1, 1, dtype=torch.float64)
    for value in (2.0**15, 2.0**-10):
        linalg.add_gram_(gram, torch.tensor([[value]]))
    assert gram.item() == 2.0**30 + 2.0**-20


@pytest.mark.parametrize("chunks", [[60], [1] * 60, [7, 7, 46], [46, 14], [12, 24, 24], [59, 1]])
def test_stacked_r_does_not_depend_on_chunking(chunks: list[int]) -> None:
    z_TF = activations(60, 12)
    r_FF = torch.empty(0, 12, dtype=torch.float64)
    for rows in z_TF.split(chunks):
        r_FF = linalg.r_factor(torch.cat([r_FF, rows]))
    gram = z_TF.T @ z_TF
    assert float((r_FF.T @ r_FF - gram).norm() / gram.norm()) < 1e-12
    assert float((r_FF - r_of(z_TF)).norm() / r_FF.norm()) < 1e-12
    assert bool((torch.diagonal(r_FF) >= 0).all())
    assert torch.equal(r_FF, torch.triu(r_FF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_r_of_fewer_tokens_than_columns(dtype: torch.dtype) -> None:
    z_TF = activations(5, 12).to(dtype)
    r_TF = linalg.r_factor(torch.cat([r_of(z_TF[:3]), z_TF[3:]]))
    assert r_TF.shape == (5, 12)
    torch.testing.assert_close(
        r_TF.T @ r_TF, z_TF.double().T @ z_TF.double(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(8))
def test_pivots_equal_column_pivoted_qr(seed: int) -> None:
    z_TF, scale_F = activations(120, 24, seed), scales(24, seed + 100)
    pivots = scipy.linalg.qr((z_TF * scale_F).numpy(), mode="r", pivoting=True)[1].tolist()
    assert all(pivot(z_TF, scale_F) == pivots for pivot in ALL)


def test_qr_route_pivots_an_ill_conditioned_input_as_qr_of_z_does() -> None:
    """Column sizes over ten decades, which a Gram matrix cannot hold."""
    z_TF, scale_F = (
        torch.linalg.qr(activations(80, 10)).Q,
        torch.logspace(0, -10, 10, dtype=torch.float64).flip(0),
    )
    assert (
        by_r(z_TF, scale_F)
        == scipy.linalg.qr((z_TF * scale_F).numpy(), mode="r", pivoting=True)[1].tolist()
        == list(range(9, -1, -1))
    )


@pytest.mark.parametrize("pivot", ALL)
@pytest.mark.parametrize("seed", range(4))
def test_dead_and_dependent_columns_come_last_by_their_energy(
    pivot: Callable[[Tensor, Tensor], list[int]], seed: int
) -> None:
    z_TF = activations(50, 8, seed)
    z_TF[:, [0, 2]] = 0
    z_TF[:, 5] = 0.1 * (z_TF[:, 1] - z_TF[:, 3])
    z_TF[:, 7] = 0.5 * z_TF[:, 4]
    order = pivot(z_TF, torch.ones(8, dtype=torch.float64))
    assert set(order[:4]) == {1, 3, 4, 6}
    assert order[4:] == [7, 5, 0, 2]


@pytest.mark.parametrize("pivot", ALL)
def test_columns_without_any_energy_stay_in_index_order(
    pivot: Callable[[Tensor, Tensor], list[int]],
) -> None:
    assert pivot(
        torch.zeros(4, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    ) == list(range(6))


@pytest.mark.parametrize("pivot", [blocks_by_gram, blocks_by_r])
@pytest.mark.parametrize(("units", "block"), [(6, 4), (8, 1), (3, 7), (5, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_block_pivots_equal_explicit_projection(
    pivot: Callable[..., list[int]], units: int, block: int, seed: int
) -> None:
    z_TF, scale_F = activations(90, units * block, seed), scales(units * block, seed)
    for count in range(1, units + 1):
        taken = pivot(z_TF, scale_F, block, count)
        assert taken == greedy_blocks(z_TF, scale_F, block, count)
        assert len(set(taken)) == count


def test_blocks_of_one_column_are_column_pivoting() -> None:
    z_TF, scale_F = activations(90, 12), scales(12)
    assert (
        blocks_by_gram(z_TF, scale_F, 1, 12)
        == blocks_by_r(z_TF, scale_F, 1, 12)
        == by_r(z_TF, scale_F)
    )


@pytest.mark.parametrize("pivot", [blocks_by_gram, blocks_by_r])
def test_dependent_blocks_are_taken_last(pivot: Callable[..., list[int]]) -> None:
    """Blocks 1 and 3 lie in the span of 0 and 2, block 2 has a dependent column, block 4 is
    dead.
    """
    z_TF = activations(60, 15)
    z_TF[:, 8] = z_TF[:, 6] - z_TF[:, 7]
    z_TF[:, 3:6] = 0.3 * z_TF[:, 0:3]
    z_TF[:, 9:12] = 0.1 * (z_TF[:, 0:3] + z_TF[:, 6:9])
    z_TF[:, 12:] = 0
    taken = pivot(z_TF, torch.ones(15, dtype=torch.float64), 3, 5)
    assert set(taken[:2]) == {0, 2}
    assert sorted(taken) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pivot", [blocks_by_gram, blocks_by_r])
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 1, 1, 1], [0, 1, 2, 3]), ([1, 2, 1, 2], [1, 3, 0, 2]), ([0, 0, 0, 1], [3, 0, 1, 2])],
)
def test_ties_between_blocks_go_to_the_lower_index(
    pivot: Callable[..., list[int]], sizes: list[int], expected: list[int]
) -> None:
    columns = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(3)
    assert pivot(torch.eye(12, dtype=torch.float64), columns, 3, 4) == expected


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 2.5, 1e6])
def test_both_solvers_agree_with_the_normal_equations(ridge: float) -> None:
    z_TF, target_TD = activations(60, 10), activations(60, 4, seed=7)
    r_FF = r_of(torch.cat([z_TF, target_TD], dim=1))
    gram, cross = z_TF.T @ z_TF, z_TF.T @ target_TD
    expected = torch.linalg.solve(gram + ridge * torch.eye(10, dtype=torch.float64), cross)
    solutions = (
        linalg.cholesky_solver(gram, ridge)(cross.T),
        linalg.least_squares_solver(r_FF[:10, :10], ridge)(r_FF[:10, 10:].T),
    )
    for solution in solutions:
        torch.testing.assert_close(solution, expected.T, rtol=1e-10, atol=1e-13)


def dead(z_TF: Tensor) -> None:
    z_TF[:, 2] = 0


def twins(z_TF: Tensor) -> None:
    z_TF[:, 2] = z_TF[:, 5]


def combination(z_TF: Tensor) -> None:
    z_TF[:, 2] = z_TF[:, [0, 1, 3, 4, 5]] @ torch.tensor(
        [0.3, -0.7, 1.1, 0.2, -0.5], dtype=torch.float64
    )


@pytest.mark.parametrize("spoil", [dead, twins, combination])
@pytest.mark.parametrize("seed", range(6))
def test_singular_systems_are_refused_with_advice_unless_damped(
    spoil: Callable[[Tensor], None], seed: int
) -> None:
    z_TF = activations(40, 6, seed)
    spoil(z_TF)
    gram, cross, r_FF = z_TF.T @ z_TF, z_TF.T @ z_TF[:, :2], r_of(z_TF)
    with pytest.raises(ModelError, match=r"raise correction\.damping"):
        linalg.cholesky_solver(gram.clone(), 0.0)
    with pytest.raises(ModelError, match=r"raise correction\.damping"):
        linalg.least_squares_solver(r_FF, 0.0)
    by_gram, by_rows = (
        linalg.cholesky_solver(gram, 0.1)(cross.T),
        linalg.least_squares_solver(r_FF, 0.1)(r_FF[:, :2].T),
    )
    torch.testing.assert_close(by_gram, by_rows, rtol=1e-10, atol=1e-12)


def lapack_pivots(gram_FF: Tensor) -> list[int]:
    _, pivots, rank, _ = scipy.linalg.lapack.dpstrf(gram_FF.numpy().copy(order="F"), lower=1)
    return [int(pivot) - 1 for pivot in pivots[:rank]]


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300, 399, 400])
@pytest.mark.parametrize("seed", range(2))
def test_panels_take_the_pivots_of_lapack_and_stop(count: int, seed: int) -> None:
    z_TF = activations(500, 400, seed)
    gram_FF = z_TF.T @ z_TF
    lower_FF = gram_FF.tril() + torch.full_like(gram_FF, torch.nan).triu(1)
    assert pivoting.cholesky_pivots_(lower_FF, count).tolist() == lapack_pivots(gram_FF)[:count]


@pytest.mark.parametrize("rank", [1, 128, 150, 390])
def test_panels_stop_at_the_rank(rank: int) -> None:
    z_TF = activations(500, 400)
    z_TF[:, torch.randperm(400, generator=torch.Generator().manual_seed(0))[rank:]] = 0
    gram_FF = z_TF.T @ z_TF
    expected = lapack_pivots(gram_FF)
    assert len(expected) == rank
    assert pivoting.cholesky_pivots_(gram_FF, 400).tolist() == expected


def test_panels_stop_at_the_rank_of_dependent_columns() -> None:
    z_TF = activations(500, 150)
    z_TF = torch.cat(
        [
            z_TF,
            0.1
            * z_TF
            @ torch.rand(150, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            / 150,
        ],
        dim=1,
    )
    assert sorted(pivoting.cholesky_pivots_(z_TF.T @ z_TF, 210).tolist()) == list(range(150))


@pytest.mark.parametrize("pivot", [blocks_by_gram, blocks_by_r])
def test_dependent_blocks_follow_by_energy(pivot: Callable[..., list[int]]) -> None:
    z_TF = activations(60, 10)
    z_TF[:, 2:4] = 0
    z_TF[:, 6:8] = 0.1 * z_TF[:, 0:2]
    z_TF[:, 8:] = 0.2 * z_TF[:, 4:6]
    taken = pivot(z_TF, torch.ones(10, dtype=torch.float64), 2, 5)
    assert set(taken[:2]) == {0, 2}
    energies = z_TF.square().sum(0).reshape(5, 2).sum(1)
    assert taken[2:] == sorted([1, 3, 4], key=lambda block: -float(energies[block]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_column_norms_of_blocks(dtype: torch.dtype) -> None:
    weight_DF = activations(1100, 7).to(dtype)
    torch.testing.assert_close(
        linalg.column_norms(weight_DF), weight_DF.double().norm(dim=0), rtol=1e-13, atol=0
    )


def test_energy_reads_the_lower_block_triangle_alone() -> None:
    z_TF, rows_BF = activations(40, 1030), activations(3, 1030, seed=5)
    gram_FF = z_TF.T @ z_TF
    gram_FF[:344, 344:], gram_FF[:688, 688:] = torch.nan, torch.nan  # three blocks
    assert linalg.gram_energy(gram_FF, rows_BF) == pytest.approx(
        float((z_TF @ rows_BF.T).square().sum()), rel=1e-12
    )
