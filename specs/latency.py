"""Measured times of a model's layers by size: what a budget of speed is counted with. `rayprune
latency` writes the file.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import Field, model_validator

from rayprune.specs.errors import SpecError
from rayprune.specs.section import Section, load_section

Phase = Literal["prefill", "decode"]


class TimedPass(Section):
    """Milliseconds of one forward pass, by part of the model."""

    phase: Phase
    """`prefill`: a prompt is read; `decode`: one token more behind what was read."""
    batch: int = Field(ge=1)
    """Sequences that are computed together."""
    tokens: int = Field(ge=1)
    """Of each: the prompt's, or those before the one that is computed."""
    outer_ms: float = Field(ge=0.0)
    """What is outside the layers: embeddings, masks, the last norm and the head."""
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

    def model(self, layers: Sequence[Mapping[str, int]]) -> float:
        """Milliseconds of a model whose layers keep so many units; one that keeps none is left
        out.
        """
        return self.outer_ms + sum(self.layer(kept) for kept in layers if any(kept.values()))

    @property
    def moved_on(self) -> int:
        """Tokens that the pass gets further by."""
        return self.batch * (self.tokens if self.phase == "prefill" else 1)

    def per_second(self, milliseconds: float) -> float:
        """Tokens per second of a pass that takes so long."""
        return 1e3 * self.moved_on / milliseconds

    def at_most(self, tokens_per_second: float) -> float:
        """Milliseconds that the pass may take for so many tokens per second."""
        return 1e3 * self.moved_on / tokens_per_second

    def __str__(self) -> str:
        """The pass in words."""
        return f"{self.phase} of {self.batch} x {self.tokens} tokens"


class LatencyTable(Section):
    """What was measured, where, and with what."""

    machine: str
    """Where it was measured."""
    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """Floating-point type of weights and activations."""
    versions: dict[str, str] = Field(default={})
    """Of the packages that compute."""
    passes: tuple[TimedPass, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _one_pass(cls, options: object) -> object:
        """A table of the first form holds one pass over a prompt, its fields beside the rest."""
        if not isinstance(options, Mapping) or "passes" in options:
            return options
        about = {name: options[name] for name in cls.model_fields if name in options}
        one = {name: value for name, value in options.items() if name not in about}
        return about | {"passes": [{"phase": "prefill", **one}]} if one else options

    def find(self, option: str, phase: Phase, batch: int | None, tokens: int | None) -> TimedPass:
        """The one pass of a phase, with so many sequences and tokens where these are given.

        Raises:
            SpecError: there is none, or more than one.
        """
        found = [
            one
            for one in self.passes
            if one.phase == phase
            and (batch is None or one.batch == batch)
            and (tokens is None or one.tokens == tokens)
        ]
        if len(found) != 1:
            raise SpecError(
                f"{option}: {len(found) or 'no'} passes of budget.latency_table are a {phase} like"
                f" that; it holds: {', '.join(map(str, self.passes))}. Name one of them by batch"
                " and tokens in budget.tokens_per_second, or measure another table"
            )
        return found[0]


@cache
def load_latency(path: str) -> LatencyTable:
    """A table from a YAML file.

    Raises:
        SpecError: there is no such file, or it describes no table.
    """
    return load_section(LatencyTable, Path(path), "a latency table")


def latency_text(table: LatencyTable) -> str:
    """A table as YAML that `load_latency` reads."""
    plain = table.model_dump() | {"passes": [one.model_dump() for one in table.passes]}
    text: str = yaml.safe_dump(plain, sort_keys=False)
    return text
