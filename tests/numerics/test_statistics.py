"""Both statistics against each other and against the activations; files against memory; blocks
against the whole.

Letters: T tokens, F width, D hidden, K kept columns.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.specs.job import CorrectionSpec
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.machine import scratch
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics import linalg
from rayprune.workers.numerics.correction import Correction, correct
from rayprune.workers.numerics.methods import select
from rayprune.workers.numerics.statistics import (
    GramStatistic,
    Moments,
    RowsStatistic,
    Statistic,
    complement,
    restored,
    statistic_type,
)
from rayprune.workers.passes.sweep import grow_statistics
from rayprune.workers.store.shards import even_parts, merge_siblings
from tests.helpers import SCRATCH

WIDTH, HIDDEN = 24, 9
STAT = StatOptions()
Kind = Callable[..., Statistic]


def activations(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(WIDTH, dtype=torch.float64) + 0.2 * torch.randn(
        WIDTH, WIDTH, generator=generator, dtype=torch.float64
    )
    return torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) @ mixing


def weight(seed: int = 9) -> Tensor:
    return torch.randn(
        HIDDEN, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def rows(*batches: Tensor, place: Scratch = SCRATCH) -> RowsStatistic:
    statistic = RowsStatistic.empty(WIDTH, place)
    for z_TF in batches:
        statistic.update(z_TF)
    return statistic


def by_workers(batches: list[Tensor], workers: int) -> RowsStatistic:
    """One micro-batch for each shard, the shards spread over workers: what the one that decides
    makes of their states.
    """
    root = (0, len(batches))
    nodes = {
        node: restored(pickle.loads(pickle.dumps(statistic)), SCRATCH)
        for part in even_parts(len(batches), workers)
        for node, statistic in grow_statistics(
            [root], (part.start, part.stop), lambda shard: rows(*batches[shard].split(3))
        ).items()
    }
    merged = merge_siblings(root, nodes, lambda left, right: left.merge(right))[root].finished()
    assert isinstance(merged, RowsStatistic)
    return merged


def test_a_statistic_is_copied_only_where_it_leaves_the_process() -> None:
    for statistic in (
        gram(torch.randn(30, WIDTH, dtype=torch.float64)),
        rows(torch.randn(30, WIDTH)),
    ):
        assert restored(statistic, SCRATCH) is statistic
        state = pickle.loads(pickle.dumps(statistic))
        assert all(isinstance(array, np.ndarray) for array in state.values())
        other = restored(state, SCRATCH)
        assert type(other) is type(statistic)
        assert torch.equal(other.gram(), statistic.gram())


def gram(z_TF: Tensor, place: Scratch = SCRATCH) -> GramStatistic:
    moments = Moments.empty(WIDTH, place.device).plus(z_TF)
    return GramStatistic(z_TF.T @ z_TF, moments, place)


def corrected(
    training: Statistic,
    held_out: Statistic,
    weight_DF: Tensor,
    kept_K: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Correction:
    return correct(training, held_out, weight_DF, kept_K, CorrectionSpec(), dtype)


@pytest.mark.parametrize(
    ("factorization", "tokens", "expected"),
    [
        ("gram", 23, RowsStatistic),
        ("gram", 24, GramStatistic),
        ("qr", 23, RowsStatistic),
        ("qr", 9999, RowsStatistic),
    ],
)
def test_gram_only_where_it_is_no_larger_than_the_rows(
    factorization: str, tokens: int, expected: type[Statistic]
) -> None:
    options = StatOptions(factorization=factorization)  # type: ignore[arg-type]
    assert statistic_type(options.needs_rows, tokens, WIDTH) is expected


@pytest.mark.parametrize("tokens", [22, 23, 90])
def test_rows_have_the_same_bits_however_the_shards_are_spread(tokens: int) -> None:
    """Few tokens, and an R factor of many; 5 shards of uneven size."""
    z_TF, weight_DF = activations(tokens).float(), weight()
    batches = [z_TF[part.start : part.stop] for part in even_parts(tokens, 5)]
    answers = []
    for statistic in [by_workers(batches, workers) for workers in (1, 2, 3, 5)]:
        training, held_out = statistic, rows(activations(40, seed=3).float()).finished()
        result = corrected(training, held_out, weight_DF, torch.arange(0, WIDTH, 2))
        answers.append(
            [
                np.array([statistic.energy(weight_DF), statistic.mean_energy]),
                statistic.column_energy,
                statistic.column_variance,
                statistic.gram(),
                statistic.order(torch.ones(WIDTH, dtype=torch.float64), 1, 6),
                statistic.order(torch.ones(WIDTH, dtype=torch.float64), 2, 6),
                result.weight_DK,
                np.array([result.training_error, result.held_out_error]),
            ]
        )
    for other in answers[1:]:
        for mine, first in zip(other, answers[0], strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(first))


@pytest.mark.parametrize("tokens", [0, 1, 10, 24, 25, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_stay_as_they_are_until_there_are_more_than_columns(
    tokens: int, dtype: torch.dtype
) -> None:
    z_TF = activations(tokens).to(dtype)
    statistic = rows(*z_TF.split(7)) if tokens else rows()
    if 0 < tokens <= WIDTH:
        assert torch.equal(torch.cat(statistic.parts), z_TF)
    elif tokens > WIDTH:
        assert [(part.shape, part.dtype) for part in statistic.parts] == [
            ((WIDTH, WIDTH), torch.float64)
        ]
    weight_DF = weight()
    assert statistic.energy(weight_DF) == pytest.approx(
        float((z_TF.double() @ weight_DF.T).square().sum()), rel=1e-12
    )
    assert statistic.mean_energy == pytest.approx(
        float(z_TF.double().square().sum()) / WIDTH, rel=1e-6
    )


@pytest.mark.parametrize("tokens", [(5, 6), (12, 13), (40, 3), (0, 4), (30, 30)])
def test_merged_rows_are_the_rows_of_both(tokens: tuple[int, int]) -> None:
    left, right = activations(tokens[0], 1), activations(tokens[1], 2)
    merged, whole = rows(left).merge(rows(right)), torch.cat([left, right])
    stacked = torch.cat(merged.parts)
    torch.testing.assert_close(stacked.T @ stacked, whole.T @ whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_survive_their_state_in_read_only_arrays(dtype: torch.dtype) -> None:
    z_TF = activations(11).to(dtype)
    state = rows(z_TF[:4], z_TF[4:]).state()
    for array in state.values():
        array.flags.writeable = False
    rebuilt = restored(state, SCRATCH)
    assert isinstance(rebuilt, RowsStatistic)
    assert torch.equal(rebuilt.parts[0], z_TF)
    assert rebuilt.parts[0].dtype == dtype
    assert np.shares_memory(rebuilt.parts[0].view(torch.uint8).numpy(), state["rows"])


def test_gram_leaves_the_arrays_of_its_state_alone() -> None:
    z_TF = activations(40)
    state = gram(z_TF).state()
    before, state["gram"].flags.writeable = state["gram"].copy(), False
    restored(state, SCRATCH).merge(restored(state, SCRATCH))
    assert np.array_equal(state["gram"], before)


def test_rows_lie_in_files_where_statistics_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "MAPPED_FROM_BYTES", 1)
    place, z_TF = Scratch(SCRATCH.device, tmp_path), activations(10)
    statistic = rows(z_TF, place=place)
    assert torch.equal(statistic.parts[0], z_TF)
    assert statistic.parts[0].data_ptr() != z_TF.data_ptr()
    assert rows(z_TF).parts[0].data_ptr() == z_TF.data_ptr()


@pytest.mark.parametrize("tokens", [0, 7, 24, 60])
@pytest.mark.parametrize("kind", [rows, gram])
def test_moments_and_products_are_those_of_all_tokens(tokens: int, kind: Kind) -> None:
    z_TF = activations(tokens) + 3.0
    statistic = kind(z_TF[:5]).merge(restored(kind(z_TF[5:]).state(), SCRATCH))
    torch.testing.assert_close(statistic.gram(), z_TF.T @ z_TF, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        statistic.column_energy, z_TF.square().sum(0), rtol=1e-11, atol=1e-11
    )
    expected = z_TF.var(0, correction=0) if tokens else torch.zeros(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(statistic.column_variance, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [18, 24, 90])
@pytest.mark.parametrize("num_kept", [6, 17])
def test_rows_and_gram_decide_alike(tokens: int, num_kept: int) -> None:
    training, held_out, weight_DF = activations(tokens, 1), activations(20, 2), weight()
    kept = [
        select(STAT, statistic, weight_DF, 1, num_kept)
        for statistic in (gram(training), rows(training))
    ]
    assert torch.equal(*kept)
    by_gram = corrected(gram(training), gram(held_out), weight_DF, kept[0])
    by_rows = corrected(rows(training), rows(held_out), weight_DF, kept[0])
    assert by_gram.damping == by_rows.damping
    torch.testing.assert_close(by_gram.weight_DK, by_rows.weight_DK, rtol=1e-9, atol=1e-9)
    assert by_gram.held_out_error == pytest.approx(by_rows.held_out_error, rel=1e-9)
    assert by_gram.training_error == pytest.approx(by_rows.training_error, rel=1e-7)


@pytest.mark.parametrize("tokens", [1, 5, 12, 13, 24])
@pytest.mark.parametrize("ridge", [1e-2, 3.0])
def test_refit_of_rows_solves_the_normal_equations(tokens: int, ridge: float) -> None:
    """12 kept columns: fewer rows than that, as many, and more."""
    z_TF, weight_DF, kept_K = activations(tokens), weight(), torch.arange(0, 24, 2)
    pruned_P = complement(kept_K, WIDTH)
    z_TK = z_TF[:, kept_K]
    left_KK = z_TK.T @ z_TK + ridge * torch.eye(12, dtype=torch.float64)
    expected_KD = torch.linalg.solve(
        left_KK, z_TK.T @ (z_TF[:, pruned_P] @ weight_DF[:, pruned_P].T)
    )
    refit = rows(z_TF).refit(kept_K)
    targets = refit.targets(weight_DF)
    assert targets.shape == (HIDDEN, min(tokens, 12))
    torch.testing.assert_close(refit.solver(ridge)(targets), expected_KD.T, rtol=1e-9, atol=1e-11)


def test_fewer_tokens_than_kept_columns_need_damping() -> None:
    refit = rows(activations(5)).refit(torch.arange(6))
    with pytest.raises(
        ModelError, match=r"6 kept columns, but only 5 tokens: raise correction\.damping"
    ):
        refit.solver(0.0)


def test_few_rows_keep_the_condition_number_of_z() -> None:
    """Row sizes over six decades and a tiny ridge: squared they would leave fp64 nothing."""
    z_TF, weight_DF, kept_K = (
        activations(6) * torch.logspace(0, -6, 6, dtype=torch.float64)[:, None],
        weight(),
        torch.arange(12),
    )
    refit = rows(z_TF).refit(kept_K)
    change_DK = refit.solver(1e-20)(refit.targets(weight_DF))
    least = torch.linalg.lstsq(
        z_TF[:, :12], z_TF[:, 12:] @ weight_DF[:, 12:].T, driver="gelsd"
    ).solution
    torch.testing.assert_close(change_DK, least.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [gram, rows])
@pytest.mark.parametrize("tokens", [12, 24, 60])
def test_mapped_files_give_the_bits_of_memory(
    kind: Kind, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "MAPPED_FROM_BYTES", 1)
    results = []
    for place in (SCRATCH, Scratch(torch.device("cpu"), tmp_path)):
        training, held_out = (
            kind(activations(tokens, 1), place=place),
            kind(activations(9, 2), place=place),
        )
        kept_K = select(STAT, training, weight(), 1, 14)
        results.append((kept_K, corrected(training, held_out, weight(), kept_K)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].weight_DK, results[1][1].weight_DK)
    assert results[0][1].held_out_error == results[1][1].held_out_error


@pytest.mark.parametrize("kind", [gram, rows])
@pytest.mark.parametrize("tokens", [12, 60])
def test_blocks_are_the_whole(kind: Kind, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (4, 512):
        monkeypatch.setitem(linalg.BLOCK_ROWS, "cpu", size)
        training, held_out = kind(activations(tokens, 1)), kind(activations(9, 2))
        kept_K = select(STAT, training, weight(), 1, 14)
        results.append(corrected(training, held_out, weight(), kept_K))
    assert results[0].damping == results[1].damping
    torch.testing.assert_close(results[0].weight_DK, results[1].weight_DK, rtol=1e-11, atol=1e-11)
    assert results[0].held_out_error == pytest.approx(results[1].held_out_error, rel=1e-11)


@pytest.mark.parametrize("kind", [gram, rows])
def test_a_weight_in_its_type_on_disk_is_exact_and_left_alone(kind: Kind) -> None:
    weight_DF = weight().bfloat16()
    before, results = weight_DF.clone(), []
    for given_DF in (weight_DF, weight_DF.double()):
        training, held_out = kind(activations(60, 1)), kind(activations(9, 2))
        kept_K = select(STAT, training, given_DF, 1, 14)
        results.append(corrected(training, held_out, given_DF, kept_K, torch.bfloat16).weight_DK)
    assert torch.equal(results[0], results[1])
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(weight_DF, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("first", [True, False])
def test_a_part_of_no_tokens_changes_nothing(first: bool, dtype: torch.dtype) -> None:
    """Not the type either in which the others are kept: an expert may be reached late."""
    z_TF = (1e3 * activations(3 * WIDTH)).to(dtype)
    parts = [rows(z_TF[:0]), rows(z_TF)]
    found = parts[0].merge(parts[1]) if first else parts[1].merge(parts[0])
    exact_FF = z_TF.double().T @ z_TF.double()
    torch.testing.assert_close(found.finished().gram(), exact_FF, rtol=1e-9, atol=1e-6)
    assert rows(z_TF[:0]).merge(rows(z_TF[:0])).finished().num_tokens == 0
