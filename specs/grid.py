"""Overrides with several values, `budget.sparsity=0.1,0.2`: the points of a sweep."""

import json
import os
from collections.abc import Sequence
from itertools import product

from rayprune.specs.errors import SpecError
from rayprune.specs.yaml_file import Builder, parse_value

MOST_POINTS = 1000


def grid(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values that overrides give, the last one varying fastest; each as
    overrides with one value. Of an override with one value there is one, and a value
    that is given several times counts once.

    Values are separated as in a YAML list: one that holds a comma is put into quotes or brackets.

    Raises:
        SpecError: a field is given twice, or there are more than `MOST_POINTS` points.
    """
    names = [override.partition("=")[0].strip() for override in overrides]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SpecError(
            f"--set {twice[0]}: given twice; give all its values at once, separated by commas"
        )
    points = [tuple(point) for point in product(*map(_values, overrides))]
    if len(points) > MOST_POINTS:
        raise SpecError(f"--set: {len(points)} points; give fewer values, {MOST_POINTS} at most")
    return points


def varied(overrides: Sequence[str]) -> list[str]:
    """The fields that are given several values."""
    return [each.partition("=")[0].strip() for each in overrides if len(_values(each)) > 1]


def _values(override: str) -> list[str]:
    """An override for each of its values; itself where it has one, or cannot be read."""
    name, equals, value = override.partition("=")
    builder = Builder(f"--set {override}", os.getcwd(), has_lines=False)
    try:
        found = parse_value(f"[{value}]", builder).plain() if equals else []
    except SpecError:
        found = []
    if builder.problems or not isinstance(found, list) or len(found) < 2:
        return [override]
    return list(dict.fromkeys(f"{name}={_word(each, builder)}" for each in found))


def _word(value: object, builder: Builder) -> str:
    """A value as an override has it; a text without quotes where it is read as itself."""
    plain = isinstance(value, str) and value.isidentifier() and builder.plain(value).value == value
    return str(value) if plain else json.dumps(value)
