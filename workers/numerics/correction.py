"""The one correction of all methods: least squares for the kept columns, damped towards the
uncorrected weight.

W_K' = (S_KK + gI)^-1 (S_K: W + g W_K) = W_K + (S_KK + gI)^-1 S_KP W_P, with S = Z'Z. For g = 0 this
is STAT's interpolative fold, Numerical Pruning's compensation and the OBS refit alike. Where the
statistics know the drift E of the residual stream, the output is also to make up for it: + (S_KK +
gI)^-1 Z_K'E. Letters: F width, D hidden, K kept columns, P pruned ones, M size of a solver's targets, B block of
output rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.specs.job import CorrectionSpec
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
    Cost: with a Gram matrix K^3/3 + 3 K^2 D + P^2 D flops for every candidate that is tried, and
    for the rest about twice that and 2 F^2 D.
    """
    if len(kept_K) == 0:
        return Correction(weight_DF[:, :0].to(dtype), 0.0, 1.0, 1.0)
    fit = _Fit.of(training, weight_DF, kept_K)
    judge = held_out.judge(weight_DF, kept_K)
    best = fit.best(judge, options)
    training_error = _relative(
        best.training_error + fit.refit.remainder(weight_DF),
        _output_energy(training, weight_DF, kept_K.device),
    )
    held_out_error = _relative(
        best.error + judge.remainder(weight_DF), _output_energy(held_out, weight_DF, kept_K.device)
    )
    del fit, judge  # their memory
    weight_DK = _Fit.of(training.merge(held_out), weight_DF, kept_K).weight(best.damping, dtype)
    return Correction(weight_DK, best.damping, training_error, held_out_error)


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
    energy = _output_energy(held_out, weight_DF, kept_sets[0].device)
    middle = _Fit.of(training, weight_DF, kept_sets[len(kept_sets) // 2])
    damping = middle.best(held_out.judge(weight_DF, middle.kept_K), options).damping
    errors = []
    for kept_K in kept_sets:
        judge = held_out.judge(weight_DF, kept_K)
        trial = _Fit.of(training, weight_DF, kept_K).trial(damping, judge)
        errors.append(_relative(trial.error + judge.remainder(weight_DF), energy) ** 2)
    return damping, errors


def corrected(
    statistic: Statistic, weight_DF: Tensor, kept_K: Tensor, damping: float, dtype: torch.dtype
) -> Tensor:
    """The corrected weight (D, K) for a damping that is known; the statistic is not consumed."""
    return _Fit.of(statistic, weight_DF, kept_K).weight(damping, dtype)


@dataclass(frozen=True)
class _Trial:
    """A damping, its squared error on the held-out tokens, and that on the tokens of the fit, each
    less its remainder.
    """

    damping: float
    error: float
    training_error: float


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
    def of(cls, statistic: Statistic, weight_DF: Tensor, kept_K: Tensor) -> "_Fit":
        refit = statistic.refit(kept_K)
        return cls(statistic, refit, weight_DF, kept_K, refit.targets(weight_DF))

    def _ridge(self, damping: float) -> float:
        # without any energy every ridge gives no change, but none would be singular
        return damping * (self.statistic.mean_energy or 1.0)

    def _changes(self, damping: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Per block its rows, the weight in fp64, and the change of its kept columns."""
        solve = self.refit.solver(self._ridge(damping))
        for rows, weight_BF in wide_blocks(self.weight_DF, self.kept_K.device):
            yield rows, weight_BF, solve(self.targets_DM[rows])

    def best(self, held_out: Judge, options: CorrectionSpec) -> _Trial:
        """The trial with the least error, of candidates from the largest down until the error
        rises: with less damping a fit to the training tokens alone only goes on.

        The larger one of equals; candidates that are too small to solve with are passed over.

        Raises:
            ModelError: so are all.
        """
        candidates = options.candidates if options.damping == "held-out" else (options.damping,)
        best: _Trial | None = None
        for damping in sorted(candidates, reverse=True):
            try:
                trial = self.trial(damping, held_out)
            except ModelError:
                if best is None:
                    raise
                break  # with less damping it is more singular still
            if best is not None and trial.error > best.error:
                break
            if best is None or trial.error < best.error:
                best = trial
        assert best is not None, "there is at least one candidate"
        return best

    def trial(self, damping: float, judge: Judge) -> _Trial:
        """A damping, judged by other tokens."""
        error = training_error = 0.0
        for rows, weight_BF, change_BK in self._changes(damping):
            training_error += self.refit.misfit(
                change_BK, self.targets_DM[rows], self._ridge(damping)
            )
            error += judge.misfit(rows, weight_BF, change_BK)
        return _Trial(damping, error, training_error)

    def weight(self, damping: float, dtype: torch.dtype) -> Tensor:
        """W_K', rounded to `dtype`."""
        result_DK = torch.empty(
            len(self.weight_DF), len(self.kept_K), dtype=dtype, device=self.weight_DF.device
        )
        for rows, weight_BF, change_BK in self._changes(damping):
            result_DK[rows] = (
                weight_BF[:, self.kept_K].add_(change_BK).to(self.weight_DF.device, dtype)
            )
        return result_DK


def _output_energy(statistic: Statistic, weight_DF: Tensor, device: torch.device) -> float:
    return sum(statistic.energy(weight_BF) for _, weight_BF in wide_blocks(weight_DF, device))


def _relative(error: float, energy: float) -> float:
    return (max(0.0, error) / energy) ** 0.5 if energy > 0 else 0.0
