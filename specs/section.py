"""Bases of all sections of a job."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator


class Section(BaseModel):
    """Base of every section: frozen, closed, documented by the docstrings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def named(options: Any) -> Any:
    """A section with a name as its only option may be written as that name alone."""
    return {"name": options} if isinstance(options, str) else options


def told_apart_by_name(default: str) -> Discriminator:
    """Chooses among the classes of a section by the option `name`, `default` where there is none."""

    def name(options: Any) -> str:
        return str(options.get("name", default) if isinstance(options, Mapping) else getattr(options, "name", default))

    return Discriminator(name)
