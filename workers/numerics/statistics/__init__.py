"""What is remembered of the calibration activations: a Gram matrix or rows. Both answer the same
questions.

A statistic is additive: `update` per micro-batch, `merge` up the fixed tree
(`rayprune.workers.store.shards`).
"""

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.statistics.gram import GramStatistic
from rayprune.workers.numerics.statistics.moments import Drift, Moments
from rayprune.workers.numerics.statistics.protocol import Refit, State, Statistic, complement
from rayprune.workers.numerics.statistics.rows import RowsStatistic

__all__ = [
    "Drift",
    "GramStatistic",
    "Moments",
    "Refit",
    "RowsStatistic",
    "State",
    "Statistic",
    "complement",
    "restored",
    "statistic_type",
]


def statistic_type(needs_rows: bool, num_tokens: int, width: int) -> type[Statistic]:
    """The Gram matrix, unless rows are asked for or the activations themselves are smaller."""
    return RowsStatistic if needs_rows or num_tokens < width else GramStatistic


def restored(state: State, scratch: Scratch) -> Statistic:
    """The statistic that wrote a state."""
    kind: type[Statistic] = GramStatistic if "gram" in state else RowsStatistic
    return kind.from_state(state, scratch)
