"""What is remembered of the calibration activations: a Gram matrix or rows. Both answer the same
questions.

A statistic is additive: `update` per micro-batch, `merge` up the fixed tree
(`rayprune.workers.store.shards`).
"""

from collections.abc import Container

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.statistics.gram import GramStatistic
from rayprune.workers.numerics.statistics.moments import Drift, Moments
from rayprune.workers.numerics.statistics.protocol import (
    Judge,
    Refit,
    State,
    Statistic,
    Tensors,
    complement,
)
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
    "Tensors",
    "best_experts",
    "complement",
    "rebuilt",
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
    return _kind(statistic).from_state(statistic, scratch)


def rebuilt(tensors: Tensors, scratch: Scratch) -> Statistic:
    """The statistic that gave these tensors, in their memory."""
    return _kind(tensors).from_tensors(tensors, scratch)


def _kind(names: Container[str]) -> type[Statistic]:
    return GramStatistic if "gram" in names else RowsStatistic
