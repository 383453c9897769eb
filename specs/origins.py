"""Where every value of a job comes from: its file, an override, a recipe, or a default."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayprune.specs.explain import KeyPath
from rayprune.specs.job import JobSpec
from rayprune.specs.located import Located

DEFAULT = "default"


@dataclass(frozen=True)
class Origin:
    """A value of a job."""

    field: str
    """Its key path: `budget.sparsity`."""
    value: Any
    where: str
    """`job.yaml:3`, `--set budget.sparsity=0.3`, `recipe fast`, or `default`."""


def origins(job: JobSpec, said: Located) -> list[Origin]:
    """Every value of a job, in its order, with where `said`, from `read_job`, has it from."""
    return list(_origins(job.model_dump(mode="json"), said, ()))


def _origins(value: Any, said: Located | None, at: KeyPath) -> Iterator[Origin]:
    if not isinstance(value, dict):
        yield Origin(".".join(map(str, at)), value, said.where if said else DEFAULT)
        return
    # a section that is written as its name alone says that name, and nothing else
    short = said if said and isinstance(said.value, str) else None
    for key, item in value.items():
        named = short if key == "name" else None
        yield from _origins(item, named or (said.child(key) if said else None), (*at, key))
