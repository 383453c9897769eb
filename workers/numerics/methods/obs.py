"""OBS for structures: what costs least after the exact refit goes first, and the costs are computed
again in rounds.

Sources: Optimal Brain Surgeon (Hassibi and Stork 1993); for units ZipLM (arXiv 2302.04089, one at a
time) and OSSCAR (arXiv 2403.12983, with a local search afterwards); in rounds as Tyr-the-Pruner
does. The refit behind the scores is the damped least squares of
`rayprune.workers.numerics.correction`.

Letters: F width of the consumer's input, D hidden.

Deviations: several units go in one round, each scored as if it went alone (`rounds` as large as the
number of units is the published one at a time); the final correction chooses its own damping.
"""

import torch
from torch import Tensor

from rayprune.specs.methods.ranking.obs import ObsOptions
from rayprune.workers.numerics.elimination import Elimination
from rayprune.workers.numerics.statistics import Statistic


def rank(
    statistic: Statistic, weight_DF: Tensor, unit_columns: int, counts: range, options: ObsOptions
) -> Tensor:
    """Units by elimination down to the least of `counts`: removed ones in reverse, before them the
    kept ones by their cost.

    Exchanges are made at the least count; larger ones are snapshots on the way there. Numerics:
    fp64; ridge `options.damping` times the mean energy. Cost: about (1 + 2 P / F) F^3 + 2 P F D
    flops for P columns removed.
    """
    ridge = options.damping * (statistic.mean_energy or 1.0)
    state = Elimination.of(statistic.gram(), weight_DF, unit_columns, ridge, statistic.scratch)
    removed = state.removal_order(counts[0], options.rounds)
    state.swap_(options.swaps)
    costs_U = state.changes()
    order = torch.argsort(
        costs_U.masked_fill(~state.kept_U, -torch.inf), descending=True, stable=True
    )[: counts[0]].cpu()
    gone = torch.tensor(removed[::-1], dtype=torch.int64)
    swapped_out = (~state.kept_U).nonzero().flatten().cpu()
    swapped_out = swapped_out[~torch.isin(swapped_out, gone)]
    return torch.cat([order, swapped_out, gone[~torch.isin(gone, order)]])
