"""A composite score, of weight norm and calibrated sensitivity: the two terms within a layer of
progressive pruning (the third, across layers, is `budget.allocation`).

Letters: F width of the consumer's input, D hidden, U units.

c is how much the squared output error grows if a unit alone goes and the others are refitted (OBS
for groups: ZipLM, arXiv 2302.04089, eq. 3; `rayprune.workers.numerics.elimination`), n = |W_u| the
norm of the weights that read it, and c / n^2 its sensitivity: for one column the energy that the
others cannot express. The score is n^(2 norm) (c / n^2)^sensitivity: with both weights 1 it is c,
without `norm` the sensitivity alone, without `sensitivity` the magnitude alone. Scores are compared
as logarithms, so that no power leaves the numbers.

Source: the description behind it names the terms and no formula; powers take any unit out of the
comparison, where a sum of unlike terms would need scales of its own.
"""

import torch
from torch import Tensor

from rayprune.specs.methods.ranking.composite import CompositeOptions
from rayprune.workers.numerics.elimination import Elimination
from rayprune.workers.numerics.linalg import WIDE, column_norms
from rayprune.workers.numerics.statistics import Statistic


def rank(
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    counts: range,
    options: CompositeOptions,
) -> Tensor:
    """Units by their scores, largest first; ties by the lower index. Numerics: fp64. Cost: F^3
    flops; an F x F matrix and the weight in scratch.
    """
    ridge = options.damping * (statistic.mean_energy or 1.0)
    state = Elimination.of(statistic.gram(), weight_DF, unit_columns, ridge, statistic.scratch)
    least = torch.finfo(WIDE).tiny
    cost_U = state.changes().clamp(min=least).log()
    norm_F = column_norms(weight_DF).to(cost_U)
    squares_U = norm_F.square().reshape(-1, unit_columns).sum(1)
    norm_U = squares_U.clamp(min=least).log()
    score_U = options.norm * norm_U + options.sensitivity * (cost_U - norm_U)
    score_U[squares_U == 0] = -torch.inf  # they give nothing
    return torch.argsort(score_U, descending=True, stable=True)
