"""FLAP's score (a baseline): arXiv 2312.11983, metric WIFV.

Letters: F width of the consumer's input, D hidden, U units.

The score of a column is Var(z_j) |W[:, j]|^2, that of a KV group the mean over its columns. Deviations: the correction is the least
squares of every method here, where FLAP adds a bias that Llama's classes cannot hold; and the split between heads and neurons is the
plan's, where FLAP standardises all scores and sorts them together.
"""

import torch
from torch import Tensor

from specs.methods import FlapOptions
from workers.linalg import column_norms
from workers.statistics import Statistic


def rank(statistic: Statistic, weight_DF: Tensor, unit_columns: int, counts: range, options: FlapOptions) -> Tensor:
    """Units by the mean of Var(z_j) |W[:, j]|^2 over their columns, largest first; ties by the lower index. fp64."""
    variance_F = statistic.column_variance
    score_U = (variance_F * column_norms(weight_DF).to(variance_F.device).square()).reshape(-1, unit_columns).mean(1)
    return torch.argsort(score_U, descending=True, stable=True)
