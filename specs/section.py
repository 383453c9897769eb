"""Bases of all sections of a job."""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)

from rayprune.specs.errors import SpecError
from rayprune.specs.explain import explain
from rayprune.specs.yaml_file import Builder, parse_yaml, read_text

S = TypeVar("S", bound="Section")
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Of random numbers."""
FloatType = Literal["auto", "float32", "bfloat16", "float16"]
"""A floating-point type; what `auto` is, each section says."""


class Section(BaseModel):
    """Base of every section: frozen, closed, documented by the docstrings under its fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def given(self, *names: str) -> list[str]:
        """Those of these fields that are not as they are by default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    def leave_out(self, why: str, *names: str) -> None:
        """Refuse those of these fields that are given: nothing would read them.

        Raises:
            ValueError: one is not as it is by default.
        """
        if given := self.given(*names):
            raise ValueError(f"{given[0]}: {why}; leave it out")


def named(options: Any) -> Any:
    """A section with a name as its only option may be written as that name alone."""
    return {"name": options} if isinstance(options, str) else options


def told_apart_by_name(default: str) -> Discriminator:
    """Chooses among the classes of a section by the option `name`, `default` where there is
    none.
    """

    def name(options: Any) -> str:
        return str(
            options.get("name", default)
            if isinstance(options, Mapping)
            else getattr(options, "name", default)
        )

    return Discriminator(name)


def one_of(sections: Mapping[str, type["Section"]], default: str) -> Any:
    """The type of a field that holds one of these sections, by name, or its name alone."""
    tagged: Any = [Annotated[options, Tag(name)] for name, options in sections.items()]
    options: Any = Annotated[reduce(or_, tagged), told_apart_by_name(default)]
    short: Any = Literal[tuple(sections)]
    return Annotated[options, BeforeValidator(named, json_schema_input_type=short | options)]


def load_section(section: type[S], path: Path, what: str) -> S:
    """A section that has a YAML file of its own; `what` names that file in errors.

    Raises:
        SpecError: no such file, no YAML, or not such a section.
    """
    file = Builder(str(path), "", has_lines=True, numbers_are_keys=True)
    root = parse_yaml(read_text(path, what), file)
    if file.problems:
        raise SpecError("\n".join(file.problems))
    try:
        return section.model_validate(root.plain())
    except ValidationError as error:
        raise SpecError("\n".join(explain(error, root, section))) from None
