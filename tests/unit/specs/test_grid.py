"""Overrides with several values."""

import pytest

from rayprune.specs.errors import SpecError
from rayprune.specs.grid import grid, varied


def test_every_combination_in_order() -> None:
    overrides = ["budget.sparsity=0.1,0.2", "model.dtype=float32", "method.name=stat, obs"]
    assert grid(overrides) == [
        ("budget.sparsity=0.1", "model.dtype=float32", "method.name=stat"),
        ("budget.sparsity=0.1", "model.dtype=float32", "method.name=obs"),
        ("budget.sparsity=0.2", "model.dtype=float32", "method.name=stat"),
        ("budget.sparsity=0.2", "model.dtype=float32", "method.name=obs"),
    ]
    assert varied(overrides) == ["budget.sparsity", "method.name"]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a.b=[1, 2]", ["a.b=[1, 2]"]),
        ("a.b=[1, 2],[3]", ["a.b=[1, 2]", "a.b=[3]"]),
        ('a.b="x,y"', ['a.b="x,y"']),
        ("a.b=null,x", ["a.b=null", "a.b=x"]),
        ("a.b={c: 1}, {c: 2}", ['a.b={"c": 1}', 'a.b={"c": 2}']),
        ("a.b=true,1e-3", ["a.b=true", "a.b=0.001"]),
        ('a.b="1", yes', ['a.b="1"', "a.b=yes"]),
        ('a.b="true",true', ['a.b="true"', "a.b=true"]),
        ("no override", ["no override"]),
        ("a.b=]", ["a.b=]"]),
        ("a.b=", ["a.b="]),
    ],
)
def test_values_are_those_of_a_yaml_list(override: str, values: list[str]) -> None:
    assert grid([override]) == [(value,) for value in values]


def test_without_overrides_there_is_one_point() -> None:
    assert grid([]) == [()]


def test_a_field_twice_and_too_many_points_are_refused() -> None:
    with pytest.raises(SpecError, match="given twice"):
        grid(["a=1", "a=2"])
    with pytest.raises(SpecError, match="10000 points"):
        grid([f"{name}={','.join(map(str, range(100)))}" for name in "ab"])


def test_a_value_that_is_given_twice_counts_once() -> None:
    assert grid(["a.b=0.1, 0.1,0.10,0.2"]) == [("a.b=0.1",), ("a.b=0.2",)]
    assert varied(["a.b=0.1,0.10"]) == []
