"""STAT: Shrinking Transformers After Training (arXiv 2406.00061).

Column-pivoted QR of the consumer's input Z picks what stays; what goes is written as a combination
of what stays, Z_P ~ Z_K T, and T is folded into the consumer's weight. The fold is the
least-squares refit of `rayprune.workers.numerics.correction`: W_K + T W_P = (Z_K'Z_K)^-1 Z_K'Z W,
with W (in, out) as in the paper; stored weights are its transpose, `weight_DF`.

Letters: F width of the consumer's input, D hidden, K kept.

Deviations, each on purpose:
- columns are scaled by the norm of the consumer's columns for heads too (the paper's code leaves
  the output weight out);
- the unit of attention is a KV group with all its query heads, so that grouped-query attention
  stays valid;
- with `shrinkage` columns count as less alike than the calibration text has them: what another
  text's are is not known (Ledoit and Wolf 2004 shrink covariances likewise);
- coefficients come from all tokens, never from a sketch, and the refit is damped;
- activations come from the already pruned layers below;
- all layers get one width, and heads and neurons share the budget as a probe predicts
  (`rayprune.orchestrator.stages.stages`).
"""

from torch import Tensor

from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.numerics.linalg import column_norms
from rayprune.workers.numerics.statistics import Statistic


def rank(
    statistic: Statistic, weight_DF: Tensor, unit_columns: int, counts: range, options: StatOptions
) -> Tensor:
    """Units in the order of their pivots in Z diag(s), s_j = |W[:, j]|, of correlations less
    `options.shrinkage`; those behind the largest of `counts` follow by energy.

    Shapes: `weight_DF` in any type, the consumer's weight, or one row of gradients (`scale:
    gradients`); F = units * unit_columns. Source: arXiv 2406.00061 and its released code (FFN:
    column-pivoted QR of the scaled activations).
    """
    return statistic.order(column_norms(weight_DF), unit_columns, counts[-1], options.shrinkage)
