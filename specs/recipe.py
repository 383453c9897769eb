"""Recipes: bundles of defaults by aim, one file each in `recipes/`. What a job says itself wins."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from rayprune.specs.located import Located, shown
from rayprune.specs.yaml_file import Builder, parse_yaml, read_text

RecipeName = Literal["fast", "balanced", "best", "tiny-memory", "serving"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A bundle of defaults."""

    name: str
    about: str
    """For what, and at what cost, in a sentence."""
    job: Located
    """Sections as a job has them; every value says that it comes from here."""


@cache
def recipe(name: RecipeName) -> Recipe:
    """A recipe by its name."""
    file = _FOLDER / f"{name}.yaml"
    parts = parse_yaml(read_text(file, "a recipe"), Builder(f"recipe {name}", "", has_lines=False))
    about, job = parts.child("about"), parts.child("job")
    assert about
    assert job
    return Recipe(name, about.value, job)


def recipe_of(root: Located) -> Recipe | None:
    """The recipe that a job names; None where it names none that there is."""
    named = root.child("recipe")
    name = named.value if named else None
    return recipe(name) if name in RECIPES else None


def with_recipe(root: Located) -> Located:
    """A job with what its recipe gives, wherever it says nothing itself."""
    found = recipe_of(root)
    return _under(found.job, root) if found else root


def given_by(found: Recipe) -> Iterator[str]:
    """What a recipe gives, as lines such as `budget.per_layer: true`."""
    return _lines(found.job)


def _lines(node: Located, name: str = "") -> Iterator[str]:
    if not isinstance(node.value, dict):
        yield f"{name}: {shown(node.plain())}"
        return
    for key, item in node.value.items():
        yield from _lines(item, f"{name}.{key}" if name else key)


def _under(given: Located, own: Located) -> Located:
    """Sections are joined field by field; all else, and a section by another name (`method`), is
    what the job says. A section that the job sets to null goes.
    """
    if isinstance(own.value, str) and given.child("name"):
        own = replace(own, value={"name": own})
    if not (isinstance(own.value, dict) and isinstance(given.value, dict)):
        return own
    name, other = own.child("name"), given.child("name")
    if name and other and name.value != other.value:
        return own
    joined = dict(given.value)
    for key, item in own.value.items():
        under = given.child(key)
        if under and item.value is None and isinstance(under.value, dict):
            del joined[key]
        else:
            joined[key] = _under(under, item) if under else item
    return replace(own, value=joined)
