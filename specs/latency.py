"""Measured times of a model's layers by size: what a latency budget is counted with. `rayprune
latency` writes the file.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field

from rayprune.specs.errors import SpecError
from rayprune.specs.section import Section, load_section


class LatencyTable(Section):
    """Milliseconds of one forward pass, by part of the model."""

    machine: str
    """Where it was measured."""
    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """Floating-point type of weights and activations."""
    batch: int = Field(ge=1)
    """Sequences that are computed together."""
    tokens: int = Field(ge=1)
    """Tokens of each."""
    outer_ms: float = Field(ge=0.0)
    """What is outside the layers: the last norm and the head."""
    layer_ms: float = Field(gt=0.0)
    """One layer as it is."""
    narrowed_ms: dict[str, Annotated[dict[int, float], Field(min_length=1)]]
    """By coupled group: one layer with so many units of that group, and all of the others; 0:
    without the block.
    """

    def layer(self, kept: Mapping[str, int]) -> float:
        """Milliseconds of a layer that keeps so many units: what each group saves is taken to add
        up, linear between measured sizes.

        Raises:
            SpecError: a group was not measured.
        """
        if missing := sorted(kept.keys() - self.narrowed_ms.keys()):
            raise SpecError(
                f"budget.latency_table: narrowed_ms lacks {missing}; write the table with `rayprune"
                " latency` for this model"
            )
        return self.layer_ms + sum(
            self._narrowed(name, count) - self.layer_ms for name, count in kept.items()
        )

    def _narrowed(self, name: str, count: int) -> float:
        counts = sorted(self.narrowed_ms[name])
        return float(np.interp(count, counts, [self.narrowed_ms[name][known] for known in counts]))


@cache
def load_latency(path: str) -> LatencyTable:
    """A table from a YAML file.

    Raises:
        SpecError: there is no such file, or it describes no table.
    """
    return load_section(LatencyTable, Path(path), "a latency table")


def latency_text(table: LatencyTable) -> str:
    """A table as YAML that `load_latency` reads."""
    text: str = yaml.safe_dump(table.model_dump(), sort_keys=False)
    return text
