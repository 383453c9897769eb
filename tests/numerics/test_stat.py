"""STAT's selection against greedy pivoting written out, and against the definition of a KV
group.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.model.config import Config
from rayprune.workers.model.families import family_of
from rayprune.workers.numerics.linalg import unit_rows
from rayprune.workers.numerics.methods import select
from rayprune.workers.numerics.statistics import GramStatistic, Moments, RowsStatistic, Statistic
from tests.helpers import SCRATCH, correlated

ROUTES = ["gram", "qr"]
STAT = StatOptions()


def data(width: int, seed: int) -> tuple[Tensor, Tensor]:
    return correlated(40, width, 3, seed, mixed=0.4)


def statistic(route: str, z_TF: Tensor) -> Statistic:
    moments = Moments.empty(z_TF.shape[1], SCRATCH.device).plus(z_TF)
    return (
        GramStatistic(z_TF.T @ z_TF, moments, SCRATCH)
        if route == "gram"
        else RowsStatistic([z_TF], moments, SCRATCH)
    )


def greedy(z_TF: Tensor, weight_DF: Tensor, columns: int, count: int) -> list[int]:
    """Take the unit whose scaled columns have the most energy outside the span of those taken; by
    Gram-Schmidt, column by column.
    """
    rest = (z_TF * weight_DF.norm(dim=0)).numpy().copy()
    units, taken = rest.shape[1] // columns, list[int]()
    for _ in range(count):
        energy = {
            unit: (rest[:, unit * columns : (unit + 1) * columns] ** 2).sum()
            for unit in range(units)
            if unit not in taken
        }
        taken.append(max(energy, key=energy.__getitem__))
        for column in range(taken[-1] * columns, (taken[-1] + 1) * columns):
            direction = rest[:, column] / np.linalg.norm(rest[:, column])
            rest -= np.outer(direction, direction @ rest)
    return sorted(taken)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("units", "columns"), [(7, 1), (4, 3), (3, 2), (2, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_selection_is_greedy_pivoting_on_scaled_columns(
    route: str, units: int, columns: int, seed: int
) -> None:
    z_TF, weight_DF = data(units * columns, seed)
    for count in range(1, units):
        kept = select(STAT, statistic(route, z_TF), weight_DF, columns, count)
        assert kept.dtype == torch.int64
        assert kept.tolist() == greedy(z_TF, weight_DF, columns, count)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("units", "columns"), [(7, 1), (4, 3)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shrinkage", [0.3, 1.0])
def test_shrinkage_takes_part_of_the_correlations_away(
    route: str, units: int, columns: int, seed: int, shrinkage: float
) -> None:
    z_TF, weight_DF = data(units * columns, seed)
    gram_FF = z_TF.T @ z_TF
    shrunk_FF = (1 - shrinkage) * gram_FF + shrinkage * torch.diag(torch.diagonal(gram_FF))
    rows_FF = torch.linalg.cholesky(shrunk_FF).T
    options = StatOptions(shrinkage=shrinkage)
    for count in range(1, units + 1):
        kept = select(options, statistic(route, z_TF), weight_DF, columns, count)
        assert kept.tolist() == greedy(rows_FF, weight_DF, columns, count)


@pytest.mark.parametrize("route", ROUTES)
def test_the_consumer_weight_decides_between_columns_alike(route: str) -> None:
    z_TF = torch.eye(5, dtype=torch.float64)
    weight_DF = torch.tensor([[1.0, 5.0, 0.0, 3.0, 2.0]], dtype=torch.float64)
    assert select(STAT, statistic(route, z_TF), weight_DF, 1, 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("route", ROUTES)
def test_a_copy_of_a_kept_column_goes(route: str) -> None:
    z_TF, weight_DF = data(4, 0)
    z_TF[:, 3] = 0.9 * z_TF[:, 1]
    kept = select(STAT, statistic(route, z_TF), torch.ones_like(weight_DF), 1, 3).tolist()
    assert kept == [0, 1, 2]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_selection_leaves_the_statistic_as_it_was(route: str, seed: int) -> None:
    z_TF, weight_DF = data(6, seed)
    used, columns = statistic(route, z_TF), [1, 3]
    before = {name: array.copy() for name, array in used.state().items()}
    for width in columns:
        select(STAT, used, weight_DF, width, 1)
    assert all(np.array_equal(before[name], array) for name, array in used.state().items())


def test_kv_groups_are_never_split_and_query_heads_follow() -> None:
    config = Config(
        {
            "model_type": "llama",
            "vocab_size": 260,
            "hidden_size": 36,
            "num_hidden_layers": 1,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 6,
            "intermediate_size": 8,
        }
    )
    heads, _ = family_of(config).describe(config).groups
    z_TF, weight_DF = data(36, 0)
    for route in ROUTES:
        units = select(STAT, statistic(route, z_TF), weight_DF, heads.columns, 2)
        assert units.tolist() == greedy(z_TF, weight_DF, 12, 2)
    units = torch.tensor([0, 2])
    assert unit_rows(units, heads.columns).tolist() == [*range(12), *range(24, 36)]
    queries, keys, values = (unit_rows(units, axis.per_unit).tolist() for axis in heads.axes)
    assert queries == [*range(12), *range(24, 36)]  # query heads 0, 1 and 4, 5
    assert keys == values == [*range(6), *range(12, 18)]
