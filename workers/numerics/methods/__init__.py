"""The pruning methods: one module each, pure tensor functions, found by the name of their options.

A method ranks the units of a coupled group: of `rank(statistic, weight_DF, unit_columns, counts,
options)` the first k are the ones that stay, for every k in the range `counts`. A method whose
scores can be compared between layers has `scores(statistic, weight_DF, unit_columns, num_kept,
options)` too.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

from rayprune.specs.methods.options import MethodOptions
from rayprune.workers.numerics.statistics import Statistic


class Method(Protocol):
    """The module of a method; `scores` only with `MethodOptions.comparable_scores`."""

    rank: Callable[[Statistic, Tensor, int, range, Any], Tensor]
    scores: Callable[[Statistic, Tensor, int, float, Any], Tensor]


def method_of(options: MethodOptions) -> Method:
    """The module that ranks as these options say."""
    return cast(Method, import_module(f"{__name__}.{options.name}"))


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
    method = method_of(options)
    return method.scores(statistic, weight_DF, unit_columns, num_kept, options).cpu()


def rank(
    options: MethodOptions,
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    counts: range,
) -> Tensor:
    """Units of a group, on the CPU; the first k are the ones that stay, for every k in `counts`."""
    return method_of(options).rank(statistic, weight_DF, unit_columns, counts, options).cpu()


def select(
    options: MethodOptions,
    statistic: Statistic,
    weight_DF: Tensor,
    unit_columns: int,
    num_kept: int,
) -> Tensor:
    """The `num_kept` units that stay, ascending."""
    counts = range(num_kept, num_kept + 1)
    ranking = rank(options, statistic, weight_DF, unit_columns, counts)
    return ranking[:num_kept].sort().values
