"""Every method's ranking against its definition, and against all the others' contract."""

from inspect import signature
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import Tensor

from rayprune.specs.job import CorrectionSpec
from rayprune.specs.methods import ranking
from rayprune.specs.methods.options import MethodOptions
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.specs.methods.ranking.composite import CompositeOptions
from rayprune.specs.methods.ranking.flap import FlapOptions
from rayprune.specs.methods.ranking.numerical import NumericalOptions
from rayprune.specs.methods.ranking.obs import ObsOptions
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.specs.methods.ranking.wanda import WandaOptions
from rayprune.workers.numerics import methods
from rayprune.workers.numerics.correction import correct
from rayprune.workers.numerics.methods import method_of, numerical, rank, scores, select
from rayprune.workers.numerics.statistics import RowsStatistic
from tests.helpers import SCRATCH, correlated

UNITS, HIDDEN = 10, 4
METHODS = [options.model_validate({}) for options in RANKINGS.values()]
METHODS += [StatOptions(factorization="qr"), ObsOptions(rounds=3, swaps=5)]


def data(columns: int, seed: int = 0, tokens: int = 80) -> tuple[Tensor, Tensor]:
    """Activations with unlike columns and a mean, and a weight."""
    return correlated(tokens, UNITS * columns, HIDDEN, seed, mean=0.2, uneven=True)


def statistic(z_TF: Tensor) -> RowsStatistic:
    """Exact, and of either kind of storage."""
    result = RowsStatistic.empty(z_TF.shape[1], SCRATCH)
    result.update(z_TF)
    return result


def test_every_module_of_a_method_has_options_under_its_name_and_the_other_way_round() -> None:
    assert {module.name for module in iter_modules(methods.__path__)} == RANKINGS.keys()
    assert {module.name for module in iter_modules(ranking.__path__)} == RANKINGS.keys()
    parameters = ["statistic", "weight_DF", "unit_columns", "counts", "options"]
    for name, options in RANKINGS.items():
        module: Any = method_of(options.model_validate({"name": name}))
        assert list(signature(module.rank).parameters) == parameters


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_methods_whose_scores_can_be_compared_have_scores(options: MethodOptions) -> None:
    assert hasattr(method_of(options), "scores") == options.comparable_scores
    if options.comparable_scores:
        z_TF, weight_DF = data(3)
        found = scores(options, statistic(z_TF), weight_DF, 3, 4)
        assert found.shape == (UNITS,)
        first = rank(options, statistic(z_TF), weight_DF, 3, range(4, 5)).tolist()
        assert first == found.argsort(descending=True).tolist()


def test_a_heads_score_counts_times_its_parameters_over_those_of_a_neuron() -> None:
    """For `times-cost` alone."""
    given, cost = {"heads": [0.5, -0.25], "neurons": [0.1, 0.7]}, {"heads": 12, "neurons": 3}
    weighted = NumericalOptions(head_score="times-cost").weighted_scores(given, cost)
    assert weighted == {"heads": [2.0, -1.0], "neurons": [0.1, 0.7]}
    assert NumericalOptions().weighted_scores(given, cost) == given
    assert FlapOptions().weighted_scores(given, cost) == given


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("tokens", [6, 80])
class TestContract:
    """What the sweep relies on, for every method."""

    def test_kept_units_are_distinct_and_ascend(
        self, options: MethodOptions, columns: int, tokens: int
    ) -> None:
        z_TF, weight_DF = data(columns, tokens=tokens)
        for count in (1, 4, UNITS - 1):
            kept = select(options, statistic(z_TF), weight_DF, columns, count).tolist()
            assert kept == sorted(set(kept))
            assert len(kept) == count
            assert set(kept) <= set(range(UNITS))

    def test_same_input_same_answer_and_the_weight_in_any_type(
        self, options: MethodOptions, columns: int, tokens: int
    ) -> None:
        z_TF, weight_DF = data(columns, tokens=tokens)
        weight_DF = weight_DF.bfloat16()
        first, second = (
            select(options, statistic(z_TF), given, columns, 4)
            for given in (weight_DF, weight_DF.double())
        )
        assert torch.equal(first, second)

    def test_units_that_carry_nothing_go_first(
        self, options: MethodOptions, columns: int, tokens: int
    ) -> None:
        z_TF, weight_DF = data(columns, tokens=tokens)
        for unit in (2, 5):
            z_TF[:, unit * columns : (unit + 1) * columns] = 0
        kept = select(options, statistic(z_TF), weight_DF, columns, 3).tolist()
        assert not {2, 5} & set(kept)

    def test_a_ranking_serves_a_range_of_counts(
        self, options: MethodOptions, columns: int, tokens: int
    ) -> None:
        z_TF, weight_DF = data(columns, tokens=tokens)
        order = rank(options, statistic(z_TF), weight_DF, columns, range(3, 9)).tolist()
        assert len(set(order)) == len(order) >= 8


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize(("norm", "sensitivity"), [(1, 1), (0, 1), (1, 0), (0.5, 2)])
def test_a_composite_score_is_norm_and_sensitivity_each_to_its_power(
    norm: float, sensitivity: float, columns: int
) -> None:
    """c by what it means: the squared error, and the ridge's share, of the best refit without the
    unit.
    """
    z_TF, weight_DF = data(columns)
    options = CompositeOptions(norm=norm, sensitivity=sensitivity, damping=0.1)
    gram_FF = z_TF.T @ z_TF
    ridge_FF = 0.1 * gram_FF.diagonal().mean() * torch.eye(len(gram_FF))
    score_U = []
    for gone in torch.arange(len(gram_FF)).split(columns):
        kept = torch.tensor([n for n in range(len(gram_FF)) if n not in gone])
        damped_FF = gram_FF + ridge_FF
        change_DK = torch.linalg.solve(
            damped_FF[kept][:, kept], damped_FF[kept][:, gone] @ weight_DF[:, gone].T
        ).T
        lost_DF = -weight_DF.clone()
        lost_DF[:, kept] = change_DK
        cost = (lost_DF @ damped_FF * lost_DF).sum()
        size = weight_DF[:, gone].square().sum()
        score_U.append(size**norm * (cost / size) ** sensitivity)
    expected = torch.stack(score_U).argsort(descending=True).tolist()
    found = rank(options, statistic(z_TF), weight_DF, columns, range(4, 5)).tolist()
    assert found == expected


def test_a_unit_of_zeros_is_the_first_to_go_by_a_composite_score() -> None:
    """Also by its sensitivity alone, which is that of nothing."""
    z_TF, weight_DF = data(1)
    weight_DF[:, 3] = 0
    for norm in (0.0, 0.5):
        options = CompositeOptions(norm=norm, sensitivity=1.0, damping=0.1)
        found = rank(options, statistic(1e-6 * z_TF), weight_DF, 1, range(4, 5)).tolist()
        assert found[-1] == 3


@pytest.mark.parametrize("columns", [1, 3])
def test_scores_of_flap_and_wanda(columns: int) -> None:
    z_TF, weight_DF = data(columns)
    flap = (z_TF.var(0, correction=0) * weight_DF.square().sum(0)).reshape(UNITS, columns).mean(1)
    wanda = (weight_DF.abs() * z_TF.norm(dim=0)).sum(0).reshape(UNITS, columns).sum(1)
    for options, score in ((FlapOptions(), flap), (WandaOptions(), wanda)):
        assert (
            rank(options, statistic(z_TF), weight_DF, columns, range(4, 5)).tolist()
            == score.argsort(descending=True).tolist()
        )


def test_elimination_looks_behind_a_duplicate_that_scores_do_not_see() -> None:
    """Two strong copies: either may go at no cost. Scores keep both and lose a weak column that
    nothing replaces.
    """
    z_TF, weight_DF = data(1)
    weight_DF[:] = 1.0
    z_TF[:, 1] = z_TF[:, 0] = 50 * z_TF[:, 0]
    obs, wanda = (
        select(options, statistic(z_TF), weight_DF, 1, UNITS - 1).tolist()
        for options in (ObsOptions(damping=1e-9), WandaOptions())
    )
    assert len({0, 1} & set(obs)) == 1
    assert {0, 1} <= set(wanda)


class TestNumericalPruning:
    """Newton scores and compensation from their definitions."""

    LAMBDA, RATIO = 3.0, 0.6

    def setup_method(self) -> None:
        self.z_TF, self.weight_DF = data(1)
        self.z_TF /= self.z_TF.norm(dim=0).max()
        self.kept = self.RATIO * UNITS
        gram_FF = self.z_TF.T @ self.z_TF
        self.hessian_FF = numerical.hessian(gram_FF, self.weight_DF, torch.empty_like(gram_FF))

    def objective(self, z_F: Tensor) -> Tensor:
        residual = self.z_TF @ self.weight_DF.T - (self.z_TF * z_F) @ self.weight_DF.T
        return 0.5 * residual.square().sum() + 0.5 * self.LAMBDA * (z_F.sum() - self.kept) ** 2

    def test_gradient_and_hessian_by_finite_differences(self) -> None:
        z_F, step = (
            torch.rand(UNITS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
            1e-4,
        )
        units = torch.eye(UNITS, dtype=torch.float64) * step
        gradient = [(self.objective(z_F + e) - self.objective(z_F - e)) / (2 * step) for e in units]
        expected = self.hessian_FF @ (z_F - 1) + self.LAMBDA * (z_F.sum() - self.kept)
        torch.testing.assert_close(torch.stack(gradient), expected, rtol=1e-6, atol=1e-7)
        second = [
            (
                self.objective(z_F + a + b)
                - self.objective(z_F + a - b)
                - self.objective(z_F - a + b)
                + self.objective(z_F - a - b)
            )
            / (4 * step**2)
            for a in units
            for b in units
        ]
        torch.testing.assert_close(
            torch.stack(second).view(UNITS, UNITS),
            self.hessian_FF + self.LAMBDA,
            rtol=1e-4,
            atol=1e-5,
        )

    @pytest.mark.parametrize("penalty", [1e-2, 1.0, 1e4])
    def test_one_step_is_fifty_and_the_closed_form(self, penalty: float) -> None:
        for seed in range(3):
            z_F = torch.rand(
                UNITS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            first = z_F = numerical.newton_step(z_F, self.hessian_FF, penalty, self.kept)
            for _ in range(49):
                z_F = numerical.newton_step(z_F, self.hessian_FF, penalty, self.kept)
            torch.testing.assert_close(first, z_F, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                numerical.mask(self.hessian_FF.clone(), penalty, self.kept, 0.0),
                z_F,
                rtol=1e-9,
                atol=1e-9,
            )

    def test_the_mask_has_no_gradient_and_its_mean_becomes_the_fraction_that_stays(self) -> None:
        mask = numerical.mask(self.hessian_FF.clone(), self.LAMBDA, self.kept, 0.0)
        others = [
            mask + 0.01 * torch.randn(UNITS, generator=torch.Generator().manual_seed(seed)).double()
            for seed in range(50)
        ]
        assert all(self.objective(mask) < self.objective(other) for other in others)
        strict = numerical.mask(self.hessian_FF.clone(), 1e9, self.kept, 0.0)
        assert float(strict.mean()) == pytest.approx(self.RATIO, abs=1e-6)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_units_rank_by_the_mean_of_the_mask(self, columns: int) -> None:
        z_TF, weight_DF = data(columns, seed=2)
        gram_FF = z_TF.T @ z_TF
        hessian_FF = numerical.hessian(gram_FF, weight_DF, torch.empty_like(gram_FF))
        torch.testing.assert_close(
            hessian_FF,
            (weight_DF.T @ weight_DF) * gram_FF / gram_FF.diagonal().max(),
            rtol=1e-12,
            atol=1e-14,
        )
        options = NumericalOptions(damping=1e-9)
        mask = numerical.mask(hessian_FF, options.penalty, 4 * columns, options.damping)
        expected = mask.reshape(UNITS, columns).mean(1).argsort(descending=True).tolist()
        assert rank(options, statistic(z_TF), weight_DF, columns, range(4, 5)).tolist() == expected

    @pytest.mark.parametrize("num_kept", [3, 7])
    def test_compensation_is_the_least_squares_refit(self, num_kept: int) -> None:
        """dW = -B M (M'BM)^-1 M'W with B = (2 Z'Z + g I)^-1: the correction every method shares."""
        kept_K = select(NumericalOptions(), statistic(self.z_TF), self.weight_DF, 1, num_kept)
        damping = 1e-3
        ridge = damping * float(self.z_TF.square().sum()) / UNITS
        pruned = [unit for unit in range(UNITS) if unit not in kept_K.tolist()]
        inverse = torch.linalg.inv(
            2 * self.z_TF.T @ self.z_TF + 2 * ridge * torch.eye(UNITS, dtype=torch.float64)
        )
        paper = self.weight_DF.T - inverse[:, pruned] @ torch.linalg.solve(
            inverse[pruned][:, pruned], self.weight_DF.T[pruned]
        )
        halves: Any = [statistic(part) for part in self.z_TF.split(40)]
        ours = correct(
            *halves, self.weight_DF, kept_K, CorrectionSpec(damping=damping), torch.float64
        )
        torch.testing.assert_close(ours.weight_DK.T, paper[kept_K], rtol=1e-8, atol=1e-10)
