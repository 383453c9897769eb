"""Bases of all sections of a job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from rayprune.specs.errors import SpecError

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base of every section: frozen, closed, documented by the docstrings under its fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


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


def load_section(section: type[S], path: Path) -> S:
    """A section that has a YAML file of its own.

    Raises:
        SpecError: no such file, no YAML, or not such a section.
    """
    try:
        return section.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, part['loc'])) or 'file'}: {part['msg']}"
            for part in error.errors()
        ]
        raise SpecError("\n".join(problems)) from None
