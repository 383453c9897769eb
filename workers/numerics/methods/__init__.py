"""The pruning methods: one module each, pure tensor functions.

A method ranks the units of a coupled group: of `rank(statistic, weight_DF, unit_columns, counts,
options)` the first k are the ones that stay, for every k in the range `counts`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rayprune.specs.methods import MethodOptions
from rayprune.workers.numerics.methods import flap, numerical, obs, stat, wanda
from rayprune.workers.numerics.statistics import Statistic

Rank = Callable[[Statistic, Tensor, int, range, Any], Tensor]
RANKINGS: dict[str, Rank] = {
    "stat": stat.rank,
    "numerical": numerical.rank,
    "obs": obs.rank,
    "flap": flap.rank,
    "wanda": wanda.rank,
}


Score = Callable[[Statistic, Tensor, int, float, Any], Tensor]
SCORES: dict[str, Score] = {"numerical": numerical.scores, "flap": flap.scores}
"""Of the methods whose scores can be compared between layers
(`MethodOptions.comparable_scores`).
"""


def scores(
    options: MethodOptions,
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    num_kept: float,
) -> Tensor:
    """The scores of a group's units, on the CPU, fp64, as they are when about so many units are to
    stay.
    """
    name: str = options.name  # type: ignore[attr-defined] # every option class has one
    return SCORES[name](statistic, weight_DF, unit_columns, num_kept, options).cpu()


def rank(
    options: MethodOptions,
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    counts: range,
) -> Tensor:
    """Units of a group, on the CPU; the first k are the ones that stay, for every k in `counts`."""
    name: str = options.name  # type: ignore[attr-defined] # every option class has one
    return RANKINGS[name](statistic, weight_DF, unit_columns, counts, options).cpu()


def select(
    options: MethodOptions,
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    num_kept: int,
) -> Tensor:
    """The `num_kept` units that stay, ascending."""
    return (
        rank(options, statistic, weight_DF, unit_columns, range(num_kept, num_kept + 1))[:num_kept]
        .sort()
        .values
    )
