"""Wanda's score for structures (Wanda-sp, a baseline): arXiv 2306.11695 as FLAP's authors group it.

Letters: F width of the consumer's input, D hidden, U units.

The score of a weight is |W_ij| |z_j|; that of a unit is the sum over its columns and all outputs.
Deviation: the consumer's weight is corrected afterwards, as for every method here (Wanda-sp has no
correction; `correction.damping: 1e6` all but switches it off).
"""

import torch
from torch import Tensor

from rayprune.specs.methods.ranking.wanda import WandaOptions
from rayprune.workers.numerics.linalg import WIDE, wide_blocks
from rayprune.workers.numerics.statistics import Statistic


def rank(
    statistic: Statistic, weight_DF: Tensor, unit_columns: int, counts: range, options: WandaOptions
) -> Tensor:
    """Units by sum_ij |W_ij| |z_j|, largest first; ties by the lower index. fp64."""
    energy_F = statistic.column_energy
    sums_F = torch.zeros_like(energy_F)
    for _, weight_BF in wide_blocks(weight_DF, energy_F.device):
        sums_F += weight_BF.abs().sum(0)
    score_U = (sums_F * energy_F.to(WIDE).sqrt()).reshape(-1, unit_columns).sum(1)
    return torch.argsort(score_U, descending=True, stable=True)
