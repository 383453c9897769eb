"""FLAP's score (a baseline): arXiv 2312.11983, metric WIFV.

Letters: F width of the consumer's input, D hidden, U units.

The score of a column is Var(z_j) |W[:, j]|^2, that of a KV group the mean over its columns; scores
are standardised within each group of each layer (`budget.allocation: threshold` sorts all of them
together, as FLAP does). Deviation: the correction is the least squares of every method here, where
FLAP adds a bias that Llama's classes cannot hold.
"""

import torch
from torch import Tensor

from rayprune.specs.methods.ranking.flap import FlapOptions
from rayprune.workers.numerics.linalg import column_norms
from rayprune.workers.numerics.statistics import Statistic


def scores(
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    num_kept: float,
    options: FlapOptions,
) -> Tensor:
    """The mean of Var(z_j) |W[:, j]|^2 over the columns of every unit, less the mean of all, by
    their standard deviation. fp64.
    """
    variance_F = statistic.column_variance
    score_U = (
        (variance_F * column_norms(weight_DF).to(variance_F.device).square())
        .reshape(-1, unit_columns)
        .mean(1)
    )
    deviation = score_U.std(correction=0)
    return (score_U - score_U.mean()) / (deviation if deviation > 0 else 1.0)


def rank(
    statistic: Statistic, weight_DF: Tensor, unit_columns: int, counts: range, options: FlapOptions
) -> Tensor:
    """Units by their scores, largest first; ties by the lower index."""
    return torch.argsort(
        scores(statistic, weight_DF, unit_columns, counts[0], options), descending=True, stable=True
    )
