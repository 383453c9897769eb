"""What is remembered of the calibration activations: a Gram matrix or rows. Both answer the same
questions.

A statistic is additive: `update` per micro-batch, `merge` up the fixed tree
(`rayprune.workers.store.shards`).
"""

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.statistics.gram import GramStatistic
from rayprune.workers.numerics.statistics.moments import Drift, Moments
from rayprune.workers.numerics.statistics.protocol import Judge, Refit, State, Statistic, complement
from rayprune.workers.numerics.statistics.routing import RoutingStatistic, best_experts
from rayprune.workers.numerics.statistics.rows import RowsStatistic

__all__ = [
    "Drift",
    "GramStatistic",
    "Judge",
    "Moments",
    "Refit",
    "RoutingStatistic",
    "RowsStatistic",
    "State",
    "Statistic",
    "best_experts",
    "complement",
    "restored",
    "statistic_type",
]


def statistic_type(needs_rows: bool, num_tokens: int, width: int) -> type[Statistic]:
    """The Gram matrix, unless rows are asked for or the activations themselves are smaller."""
    return RowsStatistic if needs_rows or num_tokens < width else GramStatistic


def restored(statistic: Statistic | State, scratch: Scratch) -> Statistic:
    """A statistic as it is, or the one that wrote a state, in `scratch`."""
    if not isinstance(statistic, dict):
        return statistic
    kind: type[Statistic] = GramStatistic if "gram" in statistic else RowsStatistic
    return kind.from_state(statistic, scratch)
