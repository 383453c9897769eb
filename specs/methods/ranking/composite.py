"""Options of the composite score."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.methods.options import Damping, MethodOptions, RankedGroup


class CompositeOptions(MethodOptions):
    """A composite score: the norm of a unit's weights, and how sensitive the output is to it, each
    to the power of its weight.
    """

    name: Literal["composite"] = "composite"
    norm: float = Field(default=1.0, ge=0.0, le=16.0)
    """Weight of the norm of what reads a unit."""
    sensitivity: float = Field(default=1.0, ge=0.0, le=16.0)
    """Weight of the calibrated sensitivity: of the unit's activations, what the others cannot
    express.
    """
    damping: Damping = 1e-2
    """Ridge of the refit behind the sensitivity, as a multiple of the mean diagonal."""

    @model_validator(mode="after")
    def _one_counts(self) -> Self:
        if not self.norm and not self.sensitivity:
            raise ValueError("norm and sensitivity are both 0: no unit would be above another")
        return self

    def ranking_flops(self, group: RankedGroup) -> int:
        """An inverse: F^3."""
        return group.product_flops + group.width**3

    def ranking_bytes(self, group: RankedGroup) -> int:
        """The inverse and the weight: F (F + D) 8."""
        return group.product_bytes + 8 * group.width * (group.width + group.hidden)
