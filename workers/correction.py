"""The one correction of all methods: least squares for the kept columns, damped towards the uncorrected weight.

W_K' = (S_KK + gI)^-1 (S_K: W + g W_K) = W_K + (S_KK + gI)^-1 S_KP W_P, with S = Z'Z. For g = 0 this is STAT's
interpolative fold, Numerical Pruning's compensation and the OBS refit alike.
Letters: F width, D hidden, K kept columns.
"""

from dataclasses import dataclass

from torch import Tensor

from specs.job import CorrectionSpec
from workers.statistics import Statistic


@dataclass(frozen=True)
class Correction:
    """A corrected weight, and how well it reproduces the output that was cut.

    The errors are |Z_K W_K' - Z W| / |Z W| of the fit on the training shards alone, on those and on the held-out shards;
    the weight itself is fitted on all of them.
    """

    weight_DK: Tensor
    damping: float
    training_error: float
    held_out_error: float


def correct(training: Statistic, held_out: Statistic, weight_DF: Tensor, kept_K: Tensor, options: CorrectionSpec) -> Correction:
    """Correct a consumer's weight for the loss of all but the kept columns.

    Shapes: `weight_DF` fp64; `kept_K` ascending column indices. Both statistics are consumed.
    Numerics: fp64. The damping is a multiple of the mean column energy; ties go to the larger one.
    Cost: per damping candidate K^3/3 + 4 K^2 D flops.
    """
    fit, check = training.refit(weight_DF, kept_K), held_out.refit(weight_DF, kept_K)
    candidates = options.candidates if options.damping == "held-out" else (options.damping,)
    trials = []
    for damping in sorted(candidates, reverse=True):
        change_KD = fit.solve(_ridge(damping, training))
        trials.append((check.error(change_KD), damping, change_KD))
    held_out_error, damping, change_KD = min(trials, key=lambda trial: trial[0])
    errors = (
        _relative(fit.error(change_KD), training.output_energy(weight_DF)),
        _relative(held_out_error, held_out.output_energy(weight_DF)),
    )
    everything = training.merge(held_out)
    change_KD = everything.refit(weight_DF, kept_K).solve(_ridge(damping, everything))
    return Correction(weight_DF[:, kept_K] + change_KD.T, damping, *errors)


def _ridge(damping: float, statistic: Statistic) -> float:
    return damping * (statistic.mean_energy or 1.0)  # without any energy every ridge gives no change, but none would be singular


def _relative(error: float, energy: float) -> float:
    return (error / energy) ** 0.5 if energy > 0 else 0.0
