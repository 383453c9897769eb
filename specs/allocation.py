"""How the budget is spread over the layers: one class per way, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag

from rayprune.specs.section import Section, Seed, named, told_apart_by_name


class UniformAllocation(Section):
    """All layers keep the same numbers of units."""

    name: Literal["uniform"] = "uniform"


class ThresholdAllocation(Section):
    """One threshold over the scores of all layers, for methods whose scores can be compared
    (`numerical`, `flap`).
    """

    name: Literal["threshold"] = "threshold"


class CurvesAllocation(Section):
    """Units go where the loss that is predicted for them is least for what they cost.

    The prediction: the layer's error curve in closed form, scaled by the measured divergence (KL)
    of the model's output from the dense model's when that layer's group alone is cut.
    """

    name: Literal["curves"] = "curves"
    samples: int = Field(default=4, ge=1, le=4096)
    """Calibration windows on which divergences are measured, spread over all texts; at most all, at
    least one of every text.
    """
    objective: Literal["mean", "max"] = "mean"
    """Of several calibration texts each is measured by itself; what counts: the mean of their
    divergences, or the largest.
    """
    levels: int = Field(default=12, ge=2, le=256)
    """Numbers of units per group and layer for which errors are computed, beside all of them."""
    influence: float = Field(default=1.0, ge=0.0, le=16.0)
    """Weight of that divergence, its power: above 1 layers that matter are spared more, at 0 all
    count alike.
    """
    least: float = Field(default=0.1, ge=0.0, le=1.0)
    """Every layer loses at least this part of the mean fraction that is removed."""
    most: float = Field(default=1.9, ge=1.0, le=1000.0)
    """No layer loses more than so many times the mean fraction that is removed; blocks and layers
    go whole only where this allows it.
    """


class SearchAllocation(CurvesAllocation):
    """An evolutionary search on the divergence from the dense model, from where `curves` ends."""

    name: Literal["search"] = "search"  # type: ignore[assignment]
    generations: int = Field(default=20, ge=1, le=100_000)
    """Rounds of the search."""
    offspring: int = Field(default=16, ge=1, le=4096)
    """Candidates per round; the best one, if better than their parent, is the next parent."""
    seed: Seed = 0
    """Seed of the mutations."""


_Options = Annotated[
    Annotated[UniformAllocation, Tag("uniform")]
    | Annotated[ThresholdAllocation, Tag("threshold")]
    | Annotated[CurvesAllocation, Tag("curves")]
    | Annotated[SearchAllocation, Tag("search")],
    told_apart_by_name("uniform"),
]
_Name = Literal["uniform", "threshold", "curves", "search"]
AllocationSpec = Annotated[
    _Options, BeforeValidator(named, json_schema_input_type=_Name | _Options)
]
