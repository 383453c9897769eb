"""The pruning methods: one module each, pure tensor functions.

A selector answers which units stay: `select(statistic, weight_DF, unit_columns, num_kept)`.
"""

from collections.abc import Callable

from torch import Tensor

from workers.methods import stat
from workers.statistics import Statistic

Selector = Callable[[Statistic, Tensor, int, int], Tensor]
SELECTORS: dict[str, Selector] = {"stat": stat.select}
