"""The correction against closed forms and against brute force on the activations themselves.

Letters: T tokens, F width, D hidden, K kept columns, P pruned columns. Weights are (D, F), outputs
Z W'.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.specs.job import CorrectionSpec
from rayprune.workers.numerics import linalg
from rayprune.workers.numerics.correction import (
    Correction,
    JudgedFit,
    correct,
    error_curve,
    refitted,
    uncorrected,
)
from rayprune.workers.numerics.damping import Rest, Trial, best_trial
from rayprune.workers.numerics.statistics import (
    GramStatistic,
    Moments,
    RowsStatistic,
    Statistic,
    complement,
)
from tests.helpers import SCRATCH, correlated

ROUTES = ["gram", "qr"]
TRAINING = 150
PARTS = slice(None, TRAINING), slice(TRAINING, None)


def data(
    tokens: int = 200, width: int = 20, rank: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    return correlated(tokens, width, 6, seed, rank)


def statistic(route: str, z_TF: Tensor) -> Statistic:
    if route == "gram":
        return GramStatistic(
            z_TF.T @ z_TF, Moments.empty(z_TF.shape[1], SCRATCH.device).plus(z_TF), SCRATCH
        )
    rows = RowsStatistic.empty(z_TF.shape[1], SCRATCH)
    rows.update(z_TF)
    return rows


def pivots(route: str, z_TF: Tensor, weight_DF: Tensor, count: int) -> Tensor:
    return (
        statistic(route, z_TF)
        .order(torch.linalg.vector_norm(weight_DF, dim=0), 1, count)
        .sort()
        .values
    )


def corrected(
    route: str,
    z_TF: Tensor,
    weight_DF: Tensor,
    kept_K: Tensor,
    damping: float | str = 0.0,
    training: int = TRAINING,
    **options: object,
) -> Correction:
    spec = CorrectionSpec.model_validate({"damping": damping} | options)
    return correct(
        statistic(route, z_TF[:training]),
        statistic(route, z_TF[training:]),
        weight_DF,
        kept_K,
        spec,
        torch.float64,
    )


def closed_form(z_TF: Tensor, weight_DF: Tensor, kept_K: Tensor, damping: float) -> Tensor:
    """(S_KK + gI)^-1 (S_K: W + g W_K), g a multiple of the mean column energy; as (D, K)."""
    gram, ridge = z_TF.T @ z_TF, damping * float(z_TF.square().sum()) / z_TF.shape[1]
    left = gram[kept_K][:, kept_K] + ridge * torch.eye(len(kept_K), dtype=torch.float64)
    return torch.linalg.solve(left, gram[kept_K] @ weight_DF.T + ridge * weight_DF[:, kept_K].T).T


def relative_error(z_TF: Tensor, weight_DF: Tensor, kept_K: Tensor, weight_DK: Tensor) -> float:
    output_TD = z_TF @ weight_DF.T
    return float((z_TF[:, kept_K] @ weight_DK.T - output_TD).norm() / output_TD.norm())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rank", [1, 6, 19])
def test_exact_rank_activations_prune_without_loss(route: str, rank: int) -> None:
    z_TF, weight_DF = data(rank=rank)
    kept_K = pivots(route, z_TF, weight_DF, rank)
    result = corrected(route, z_TF, weight_DF, kept_K)
    assert relative_error(z_TF, weight_DF, kept_K, result.weight_DK) < 1e-9
    # a Gram error is a difference of squares
    assert max(result.training_error, result.held_out_error) < (1e-9 if route == "qr" else 1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_kept", [1, 7, 19, 20])
def test_fold_is_least_squares_and_the_interpolative_fold(route: str, num_kept: int) -> None:
    z_TF, weight_DF = data()
    kept_K = pivots(route, z_TF, weight_DF, num_kept)
    weight_DK = corrected(route, z_TF, weight_DF, kept_K).weight_DK
    least_squares = torch.linalg.lstsq(z_TF[:, kept_K], z_TF @ weight_DF.T).solution.T
    torch.testing.assert_close(weight_DK, least_squares, rtol=1e-10, atol=1e-10)

    scale_F = torch.linalg.vector_norm(weight_DF, dim=0)
    r, order = scipy.linalg.qr((z_TF * scale_F).numpy(), mode="r", pivoting=True)
    kept, pruned = order[:num_kept], order[num_kept:]
    t_KP = torch.from_numpy(np.linalg.solve(r[:num_kept, :num_kept], r[:num_kept, num_kept:]))
    t_KP = t_KP * scale_F[kept][:, None] / scale_F[pruned]  # Z_P ~ Z_K T for the unscaled columns
    fold_DK = weight_DF[:, kept] + weight_DF[:, pruned] @ t_KP.T
    assert sorted(kept) == kept_K.tolist()
    torch.testing.assert_close(weight_DK, fold_DK[:, np.argsort(kept)], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0, 30.0])
def test_damped_correction_is_its_closed_form(route: str, damping: float) -> None:
    z_TF, weight_DF = data(seed=3)
    kept_K = pivots(route, z_TF, weight_DF, 9)
    result = corrected(route, z_TF, weight_DF, kept_K, damping)
    assert result.damping == damping
    torch.testing.assert_close(
        result.weight_DK, closed_form(z_TF, weight_DF, kept_K, damping), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("route", ROUTES)
def test_held_out_damping_is_the_best_candidate_and_errors_are_those_of_the_data(
    route: str,
) -> None:
    candidates, chosen = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), set()
    for seed in range(12):
        z_TF, weight_DF = data(tokens=60, width=20, seed=seed)
        training, held_out = z_TF[:24], z_TF[24:]
        kept_K = pivots(route, training, weight_DF, 14)
        result = corrected(
            route, z_TF, weight_DF, kept_K, "held-out", training=24, candidates=candidates
        )
        fits = {
            damping: closed_form(training, weight_DF, kept_K, damping) for damping in candidates
        }
        errors = {
            damping: relative_error(held_out, weight_DF, kept_K, fit)
            for damping, fit in fits.items()
        }
        assert result.damping == min(errors, key=errors.__getitem__)
        assert result.held_out_error == pytest.approx(errors[result.damping], rel=1e-9)
        assert result.training_error == pytest.approx(
            relative_error(training, weight_DF, kept_K, fits[result.damping]), rel=1e-9
        )
        torch.testing.assert_close(
            result.weight_DK,
            closed_form(z_TF, weight_DF, kept_K, result.damping),
            rtol=1e-10,
            atol=1e-10,
        )
        chosen.add(result.damping)
    assert len(chosen) >= 3


@pytest.mark.parametrize("route", ROUTES)
def test_candidates_are_tried_from_the_largest_until_the_error_rises(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_TF, weight_DF = data(tokens=60, width=20)
    kept_K = pivots(route, z_TF[:24], weight_DF, 14)
    tried: list[float] = []
    trial = JudgedFit.trial

    def recorded(fit: JudgedFit, damping: float) -> Trial:
        found = trial(fit, damping)
        tried.append(found.error)
        return found

    monkeypatch.setattr(JudgedFit, "trial", recorded)
    candidates = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-1, 3.0, 100.0)
    result = corrected(
        route, z_TF, weight_DF, kept_K, "held-out", training=24, candidates=candidates
    )
    *falling, risen = tried
    assert falling == sorted(falling, reverse=True)
    assert risen > falling[-1]
    assert 2 < len(tried) < len(candidates)
    assert result.damping == sorted(candidates, reverse=True)[len(falling) - 1]


@pytest.mark.parametrize("route", ROUTES)
def test_equal_held_out_errors_go_to_the_larger_damping(route: str) -> None:
    z_TF, weight_DF = data()
    # nothing is pruned: all errors are zero
    assert corrected(route, z_TF, weight_DF, torch.arange(20), "held-out").damping == 1.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damping", [0.0, 0.03, "held-out"])
def test_both_routes_keep_the_same_and_correct_alike(seed: int, damping: float | str) -> None:
    z_TF, weight_DF = data(seed=seed)
    kept = {route: pivots(route, z_TF, weight_DF, 12) for route in ROUTES}
    assert torch.equal(kept["gram"], kept["qr"])
    gram, qr = (corrected(route, z_TF, weight_DF, kept[route], damping) for route in ROUTES)
    assert gram.damping == qr.damping
    torch.testing.assert_close(gram.weight_DK, qr.weight_DK, rtol=1e-10, atol=1e-10)
    assert gram.held_out_error == pytest.approx(qr.held_out_error, rel=1e-9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_pruning_commutes_with_permuting_neurons(route: str, seed: int) -> None:
    z_TF, weight_DF = data(seed=seed)
    moved = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    kept_K, kept_of_moved_K = (
        pivots(route, z_TF, weight_DF, 9),
        pivots(route, z_TF[:, moved], weight_DF[:, moved], 9),
    )
    assert torch.equal(moved[kept_of_moved_K].sort().values, kept_K)
    plain = corrected(route, z_TF, weight_DF, kept_K, 0.01)
    permuted = corrected(route, z_TF[:, moved], weight_DF[:, moved], kept_of_moved_K, 0.01)
    back = moved[kept_of_moved_K].argsort()
    torch.testing.assert_close(permuted.weight_DK[:, back], plain.weight_DK, rtol=1e-10, atol=1e-10)
    assert permuted.held_out_error == pytest.approx(plain.held_out_error, rel=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_large_damping_leaves_the_weight_alone(route: str) -> None:
    z_TF, weight_DF = data()
    kept_K = pivots(route, z_TF, weight_DF, 9)
    changes = [
        float(
            (
                corrected(route, z_TF, weight_DF, kept_K, damping).weight_DK - weight_DF[:, kept_K]
            ).norm()
        )
        for damping in (1e2, 1e4, 1e6)
    ]
    assert changes[0] > changes[1] > changes[2]
    assert changes[2] < 1e-5
    pruned_P = complement(kept_K, 20)
    cross_KD = z_TF[:, kept_K].T @ (z_TF[:, pruned_P] @ weight_DF[:, pruned_P].T)
    ridge = 1e6 * float(z_TF.square().sum()) / 20
    assert changes[2] == pytest.approx(float(cross_KD.norm()) / ridge, rel=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("damping", [1e-3, "held-out"])
def test_activations_without_energy_leave_the_weight_alone(
    route: str, damping: float | str
) -> None:
    _, weight_DF = data()
    kept_K = torch.arange(5)
    result = corrected(route, torch.zeros(200, 20, dtype=torch.float64), weight_DF, kept_K, damping)
    assert torch.equal(result.weight_DK, weight_DF[:, kept_K])
    assert result.training_error == result.held_out_error == 0.0


@pytest.mark.parametrize("route", ROUTES)
def test_dead_kept_columns_are_no_obstacle_with_damping(route: str) -> None:
    z_TF, weight_DF = data()
    z_TF[:, :3] = 0
    result = corrected(route, z_TF, weight_DF, torch.arange(8), 0.01)
    torch.testing.assert_close(
        result.weight_DK,
        closed_form(z_TF, weight_DF, torch.arange(8), 0.01),
        rtol=1e-10,
        atol=1e-10,
    )
    assert torch.equal(result.weight_DK[:, :3], weight_DF[:, :3])


@pytest.mark.parametrize("route", ROUTES)
def test_fewer_tokens_than_columns(route: str) -> None:
    z_TF, weight_DF = data(tokens=12)
    result = corrected(route, z_TF, weight_DF, torch.arange(15), 0.1, training=9)
    torch.testing.assert_close(
        result.weight_DK,
        closed_form(z_TF, weight_DF, torch.arange(15), 0.1),
        rtol=1e-10,
        atol=1e-10,
    )
    fit = closed_form(z_TF[:9], weight_DF, torch.arange(15), 0.1)
    assert result.held_out_error == pytest.approx(
        relative_error(z_TF[9:], weight_DF, torch.arange(15), fit), rel=1e-9
    )


def with_drift(z_TF: Tensor, drift_TD: Tensor) -> GramStatistic:
    """In two micro-batches and two merged parts, through the state that travels."""
    parts = []
    for rows in (slice(None, 40), slice(40, None)):
        part = GramStatistic.empty(z_TF.shape[1], SCRATCH, drift_TD.shape[1])
        for z, drift in zip(z_TF[rows].split(25), drift_TD[rows].split(25), strict=True):
            part.update(z, drift)
        parts.append(GramStatistic.from_state(part.state(), SCRATCH))
    return parts[0].merge(parts[1]).finished()


@pytest.mark.parametrize("num_kept", [7, 13, 20])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_with_drift_the_kept_columns_make_up_for_it_too(num_kept: int, damping: float) -> None:
    """W_K + argmin over C of |Z_K C - Z_P W_P' - E|^2 + ridge |C|^2, by least squares on the
    stacked rows.
    """
    z_TF, weight_DF = data()
    drift_TD = (
        0.3 * z_TF @ data(seed=5)[1].T
        + 0.1 * torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).double()
    )
    kept_K = torch.arange(20)[-num_kept:]
    spec = CorrectionSpec(damping=damping)
    result = correct(
        with_drift(z_TF[:TRAINING], drift_TD[:TRAINING]),
        with_drift(z_TF[TRAINING:], drift_TD[TRAINING:]),
        weight_DF,
        kept_K,
        spec,
        z_TF.dtype,
    )

    def change(rows: slice) -> Tensor:
        pruned_P = complement(kept_K, 20)
        target_TD = z_TF[rows][:, pruned_P] @ weight_DF[:, pruned_P].T + drift_TD[rows]
        ridge = damping * float(z_TF[rows].square().sum()) / 20
        stacked = torch.cat(
            [z_TF[rows][:, kept_K], ridge**0.5 * torch.eye(num_kept, dtype=torch.float64)]
        )
        return torch.linalg.lstsq(
            stacked, torch.cat([target_TD, torch.zeros(num_kept, 6, dtype=torch.float64)])
        ).solution.T

    torch.testing.assert_close(
        result.weight_DK, weight_DF[:, kept_K] + change(slice(None)), rtol=1e-5, atol=1e-5
    )
    fitted_DK = weight_DF[:, kept_K] + change(slice(None, TRAINING))
    for rows, error in (
        (slice(None, TRAINING), result.training_error),
        (slice(TRAINING, None), result.held_out_error),
    ):
        output_TD = z_TF[rows] @ weight_DF.T
        misfit = (
            z_TF[rows][:, kept_K] @ fitted_DK.T - output_TD - drift_TD[rows]
        ).norm() / output_TD.norm()
        assert error == pytest.approx(float(misfit), rel=1e-4)


@pytest.mark.parametrize("route", [*ROUTES, "drift"])
def test_parts_of_the_outputs_make_the_whole(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers find each for some outputs is bit for bit what one finds for all."""
    monkeypatch.setitem(linalg.BLOCK_ROWS, "cpu", 2)
    z_TF, weight_DF = data()

    def fits() -> list[Statistic]:
        if route == "drift":
            drift_TD = 0.3 * z_TF @ data(seed=5)[1].T
            return [with_drift(z_TF[part], drift_TD[part]) for part in PARTS]
        return [statistic(route, z_TF[part]) for part in PARTS]

    kept_K, shares = torch.arange(3, 15), (slice(0, 4), slice(4, 6))
    found = [
        JudgedFit.of(*(each.of_outputs(rows) for each in fits()), weight_DF[rows], kept_K)
        for rows in shares
    ]
    whole = correct(*fits(), weight_DF, kept_K, CorrectionSpec(), torch.float64)
    best = best_trial(
        CorrectionSpec(), lambda damping: Trial.joined(fit.trial(damping) for fit in found)
    )
    rest = Rest.joined(fit.rest() for fit in found)
    weights = [
        refitted(*(each.of_outputs(rows) for each in fits()), weight_DF[rows], kept_K,
                 best.damping, torch.float64)
        for rows in shares
    ]  # fmt: skip
    assert torch.equal(torch.cat(weights), whole.weight_DK)
    assert (best.damping, rest.training_error(best), rest.held_out_error(best)) == (
        whole.damping,
        whole.training_error,
        whole.held_out_error,
    )


def test_a_candidate_that_rounding_makes_singular_is_passed_over() -> None:
    z_TF, weight_DF = data()

    def chosen(*candidates: float) -> float:
        training = statistic("gram", z_TF[:TRAINING])
        assert isinstance(training, GramStatistic)
        values, vectors = torch.linalg.eigh(training.gram_FF[:12, :12])
        training.gram_FF[:12, :12] -= (values[0] + 0.02 * training.mean_energy) * torch.outer(
            vectors[:, 0], vectors[:, 0]
        )
        options = CorrectionSpec(candidates=candidates)
        return correct(
            training,
            statistic("gram", z_TF[TRAINING:]),
            weight_DF,
            torch.arange(12),
            options,
            torch.float64,
        ).damping

    assert chosen(1e-3, 1e-2, 3e-2, 1e-1) in (3e-2, 1e-1)
    with pytest.raises(ModelError, match=r"raise correction\.damping"):
        chosen(1e-3, 1e-2)


@pytest.mark.parametrize("route", ROUTES)
def test_without_training_tokens_columns_stay_and_the_error_is_what_is_lost(route: str) -> None:
    z_TF, weight_DF = data()
    kept_K = torch.tensor([1, 4, 7, 19])
    found = uncorrected(statistic(route, z_TF), weight_DF, kept_K, torch.float64)
    assert torch.equal(found.weight_DK, weight_DF[:, kept_K])
    whole_TD = z_TF @ weight_DF.T
    lost = whole_TD - z_TF[:, kept_K] @ weight_DF[:, kept_K].T
    assert found.held_out_error == pytest.approx(float(lost.norm() / whole_TD.norm()))
    unseen = uncorrected(statistic(route, z_TF[:0]), weight_DF, kept_K, torch.float64)
    gone = weight_DF[:, complement(kept_K, weight_DF.shape[1])]
    assert unseen.held_out_error == pytest.approx(float(gone.norm() / weight_DF.norm()))
    nothing = uncorrected(statistic(route, z_TF), 0 * weight_DF, kept_K, torch.float64)
    assert nothing.held_out_error == 0


@pytest.mark.parametrize("route", ROUTES)
def test_without_held_out_tokens_a_curve_is_that_of_the_training(route: str) -> None:
    z_TF, weight_DF = data()
    kept = [torch.arange(count) for count in (16, 12, 4)]
    options = CorrectionSpec(damping=1e6)
    _, found = error_curve(
        statistic(route, z_TF), statistic(route, z_TF[:0]), weight_DF, kept, options
    )
    _, expected = error_curve(
        statistic(route, z_TF), statistic(route, z_TF), weight_DF, kept, options
    )
    assert found == pytest.approx(expected)
    assert found[0] < found[1] < found[2]
