"""The one correction of all methods: least squares for the kept columns, damped towards the
uncorrected weight.

W_K' = (S_KK + gI)^-1 (S_K: W + g W_K) = W_K + (S_KK + gI)^-1 S_KP W_P, with S = Z'Z. For g = 0 this
is STAT's interpolative fold, Numerical Pruning's compensation and the OBS refit alike. Where the
statistics know the drift E of the residual stream, the output is also to make up for it: + (S_KK +
gI)^-1 Z_K'E. Letters: F width, D hidden, K kept columns, P pruned ones, M size of a solver's
targets, B block of output rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rayprune.specs.job import CorrectionSpec
from rayprune.workers.numerics.damping import Blocks, Rest, Trial, best_trial, relative
from rayprune.workers.numerics.linalg import wide_blocks
from rayprune.workers.numerics.statistics import Judge, Refit, Statistic

NOT_CORRECTED = 1e6
"""A damping that leaves the weight all but as it was."""


@dataclass(frozen=True)
class Correction:
    """A corrected weight, and how well it reproduces the output that was cut.

    The errors are |Z_K W_K' - Z W - E| / |Z W| of the fit on the training shards alone, on those
    and on the held-out shards; the weight itself is fitted on all of them.
    """

    weight_DK: Tensor
    damping: float
    training_error: float
    held_out_error: float


def correct(
    training: Statistic,
    held_out: Statistic,
    weight_DF: Tensor,
    kept_K: Tensor,
    options: CorrectionSpec,
    dtype: torch.dtype,
) -> Correction:
    """Correct a consumer's weight for the loss of all but the kept columns.

    Of no columns the whole output is lost: an error of 1. Shapes: `weight_DF` in any type, maybe in
    a file: it is read in blocks of rows. `kept_K` ascending column indices, on the statistics'
    device. The result has `dtype` and lies beside `weight_DF`. Both statistics are consumed.
    Numerics: fp64. The damping is a multiple of the mean column energy; ties go to the larger one.
    Cost: with a Gram matrix K^3/3 + 3 K^2 D flops for every candidate that is tried, and for the
    rest about that and 2 F^2 D + 2 P^2 D.
    """
    if len(kept_K) == 0:
        return Correction(weight_DF[:, :0].to(dtype), 0.0, 1.0, 1.0)
    fit = JudgedFit.of(training, held_out, weight_DF, kept_K)
    best, rest = best_trial(options, fit.trial), fit.rest()
    del fit  # its memory
    weight_DK = refitted(training, held_out, weight_DF, kept_K, best.damping, dtype)
    return Correction(weight_DK, best.damping, rest.training_error(best), rest.held_out_error(best))


def uncorrected(
    held_out: Statistic, weight_DF: Tensor, kept_K: Tensor, dtype: torch.dtype
) -> Correction:
    """The kept columns as they are, where no training token has come. The error is that of the
    held-out ones, and where there are none either what is lost of the weight's squares.
    """
    lost_DF = weight_DF.clone()
    lost_DF[:, kept_K.to(lost_DF.device)] = 0
    lost, whole = (
        sum(_output_energies(held_out, each, kept_K.device)) for each in (lost_DF, weight_DF)
    )
    if not whole:
        lost, whole = (float(each.double().square().sum()) for each in (lost_DF, weight_DF))
    weight_DK = weight_DF[:, kept_K.to(weight_DF.device)].to(dtype).contiguous()
    error = relative(lost, whole)
    return Correction(weight_DK, NOT_CORRECTED, error, error)


def refitted(
    training: Statistic,
    held_out: Statistic,
    weight_DF: Tensor,
    kept_K: Tensor,
    damping: float,
    dtype: torch.dtype,
) -> Tensor:
    """The corrected weight (D, K) from the tokens of both statistics, which are consumed."""
    return corrected(training.merge(held_out), weight_DF, kept_K, damping, dtype)


def error_curve(
    training: Statistic,
    held_out: Statistic,
    weight_DF: Tensor,
    kept_sets: Sequence[Tensor],
    options: CorrectionSpec,
) -> tuple[float, list[float]]:
    """The damping that is best for the middle one of several kept sets, and the squared relative
    held-out error of each with it.

    Shapes as for `correct`; neither statistic is consumed.
    """
    middle = JudgedFit.of(training, held_out, weight_DF, kept_sets[len(kept_sets) // 2])
    damping = best_trial(options, middle.trial).damping
    del middle
    fits = (JudgedFit.of(training, held_out, weight_DF, kept_K) for kept_K in kept_sets)
    return damping, [fit.rest().held_out_error(fit.trial(damping)) ** 2 for fit in fits]


def corrected(
    statistic: Statistic, weight_DF: Tensor, kept_K: Tensor, damping: float, dtype: torch.dtype
) -> Tensor:
    """The corrected weight (D, K) for a damping that is known; the statistic is not consumed."""
    return _Fit.of(statistic, weight_DF, kept_K).weight(damping, dtype)


@dataclass(frozen=True)
class JudgedFit:
    """Corrections of one weight, or of some of its rows, from training tokens, and what held-out
    tokens say of them. Neither statistic is consumed.
    """

    fit: "_Fit"
    held_out: Statistic
    judge: Judge

    @classmethod
    def of(
        cls, training: Statistic, held_out: Statistic, weight_DF: Tensor, kept_K: Tensor
    ) -> Self:
        """Of kept columns, at least one."""
        judge = held_out.judge(weight_DF, kept_K)
        return cls(_Fit.of(training, weight_DF, kept_K), held_out, judge)

    def trial(self, damping: float) -> Trial:
        """A damping, judged.

        Raises:
            ModelError: it is too small to solve with.
        """
        held_out, training = [], []
        for rows, weight_BF, change_BK in self.fit.changes(damping):
            training.append(self.fit.misfit(rows, change_BK, damping))
            held_out.append(self.judge.misfit(rows, weight_BF, change_BK))
        return Trial(damping, tuple(held_out), tuple(training))

    def rest(self) -> Rest:
        """What no damping changes."""
        weight_DF, device = self.fit.weight_DF, self.fit.kept_K.device
        return Rest(
            self.judge.remainders(weight_DF),
            self.fit.refit.remainders(weight_DF),
            _output_energies(self.held_out, weight_DF, device),
            _output_energies(self.fit.statistic, weight_DF, device),
        )


@dataclass(frozen=True)
class _Fit:
    """Corrections of one weight from one statistic, block by block: no more than one ridge's factor
    is held.
    """

    statistic: Statistic
    refit: Refit
    weight_DF: Tensor
    kept_K: Tensor
    targets_DM: Tensor

    @classmethod
    def of(cls, statistic: Statistic, weight_DF: Tensor, kept_K: Tensor) -> Self:
        refit = statistic.refit(kept_K)
        return cls(statistic, refit, weight_DF, kept_K, refit.targets(weight_DF))

    def _ridge(self, damping: float) -> float:
        # without any energy every ridge gives no change, but none would be singular
        return damping * (self.statistic.mean_energy or 1.0)

    def changes(self, damping: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Per block its rows, the weight in fp64, and the change of its kept columns."""
        solve = self.refit.solver(self._ridge(damping))
        for rows, weight_BF in wide_blocks(self.weight_DF, self.kept_K.device):
            yield rows, weight_BF, solve(self.targets_DM[rows])

    def misfit(self, rows: slice, change_BK: Tensor, damping: float) -> float:
        """What is left on the tokens of the fit, less its share of the remainder."""
        return self.refit.misfit(change_BK, self.targets_DM[rows], self._ridge(damping))

    def weight(self, damping: float, dtype: torch.dtype) -> Tensor:
        """W_K', rounded to `dtype`."""
        result_DK = torch.empty(
            len(self.weight_DF), len(self.kept_K), dtype=dtype, device=self.weight_DF.device
        )
        for rows, weight_BF, change_BK in self.changes(damping):
            result_DK[rows] = (
                weight_BF[:, self.kept_K].add_(change_BK).to(self.weight_DF.device, dtype)
            )
        return result_DK


def _output_energies(statistic: Statistic, weight_DF: Tensor, device: torch.device) -> Blocks:
    return tuple(statistic.energy(weight_BF) for _, weight_BF in wide_blocks(weight_DF, device))
