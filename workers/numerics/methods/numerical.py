"""Numerical Pruning (arXiv 2412.12441, AAAI 2025): Newton scores and closed-form compensation.

A soft mask z over the columns of a consumer minimises 1/2 |Z W' - Z diag(z) W'|^2 + 1/2 lambda (1'z
- r)^2. With A = (W'W) * (Z'Z), entry by entry, the gradient is A (z - 1) + lambda (1'z - r) 1 and
the Hessian A + lambda 1 1'. The objective is quadratic, so one Newton step from anywhere is exact:
the paper's 50 iterations change nothing after the first (a test shows it). z* = 1 - c A^-1 1 with c
= lambda (F - r) / (1 + lambda 1'A^-1 1). The compensation of the paper, dW = -B M (M'BM)^-1 M'W
with B = (2 Z'Z + g I)^-1, is the least-squares refit of `rayprune.workers.numerics.correction`.

Letters: F width of the consumer's input, D hidden, U units, r columns that stay.

Deviations, each on purpose:
- A is damped: with dead or dependent columns it is singular;
- the score of a KV group is the mean over its query heads' columns (the paper has no grouped-query
  attention);
- the paper multiplies a head's score by 4/3 of the head size before one threshold over all scores,
  which would make heads all but unprunable; that factor is what a head costs in parameters, and
  here it is the budget that counts parameters (`head_score: times-cost` is the literal reading).
"""

import torch
from torch import Tensor

from rayprune.specs.methods.ranking.numerical import NumericalOptions
from rayprune.workers.numerics.linalg import WIDE, cholesky_solver, row_slices, wide_blocks
from rayprune.workers.numerics.statistics import Statistic


def hessian(gram_FF: Tensor, weight_DF: Tensor, out_FF: Tensor) -> Tensor:
    """A = (W'W) * (Z'Z) into `out_FF`, Z'Z scaled to a largest column norm of 1 as the paper scales
    Z. Cost: 2 D F^2 flops.
    """
    out_FF.zero_()
    for _, weight_BF in wide_blocks(weight_DF, gram_FF.device):
        for rows in row_slices(len(out_FF), out_FF.device):
            out_FF[rows].addmm_(weight_BF[:, rows].T, weight_BF)
    out_FF *= gram_FF
    out_FF /= torch.diagonal(gram_FF).max().clamp(min=torch.finfo(WIDE).tiny)
    return out_FF


def newton_step(z_F: Tensor, hessian_FF: Tensor, penalty: float, num_kept: float) -> Tensor:
    """z - (A + lambda 1 1')^-1 (A (z - 1) + lambda (1'z - r) 1), as the paper iterates it."""
    gradient_F = hessian_FF @ (z_F - 1) + penalty * (z_F.sum() - num_kept)
    step_F: Tensor = torch.linalg.solve(hessian_FF + penalty, gradient_F)
    return z_F - step_F


def mask(hessian_FF: Tensor, penalty: float, num_kept: float, damping: float) -> Tensor:
    """z*, in closed form. Destroys its argument. Cost: F^3 / 3 flops.

    Raises:
        ModelError: the damped Hessian is singular.
    """
    mean = float(torch.diagonal(hessian_FF).mean()) or 1.0
    ones_F = hessian_FF.new_ones(len(hessian_FF))
    inverse_F = cholesky_solver(hessian_FF, damping * mean)(ones_F[None])[0]
    return 1 - penalty * (len(ones_F) - num_kept) / (1 + penalty * inverse_F.sum()) * inverse_F


def scores(
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    num_kept: float,
    options: NumericalOptions,
) -> Tensor:
    """The mean of z* over the columns of every unit, with so many units to keep (r / unit_columns).

    The larger lambda, the nearer is a layer's mean to the fraction that stays: one threshold then
    serves all layers. Numerics: fp64. Cost: 2 D F^2 + F^3 / 3 flops; one F x F matrix in scratch.
    """
    gram_FF = statistic.gram()
    out_FF = statistic.scratch.empty(*gram_FF.shape, dtype=WIDE)
    z_F = mask(
        hessian(gram_FF, weight_DF, out_FF),
        options.penalty,
        num_kept * unit_columns,
        options.damping,
    )
    return z_F.reshape(-1, unit_columns).mean(1)


def rank(
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    counts: range,
    options: NumericalOptions,
) -> Tensor:
    """Units by their scores, largest first; ties by the lower index. Within a layer neither lambda
    nor r changes the order.
    """
    return torch.argsort(
        scores(statistic, weight_DF, unit_columns, counts[0], options), descending=True, stable=True
    )
