"""Options of Numerical Pruning."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from rayprune.specs.methods.options import Damping, MethodOptions, RankedGroup


class NumericalOptions(MethodOptions):
    """Numerical Pruning (arXiv 2412.12441): Newton scores of attention and MLP, closed-form
    compensation.
    """

    name: Literal["numerical"] = "numerical"
    penalty: float = Field(default=1e4, gt=0.0)
    """Weight (lambda) of the constraint on how many units stay; as it grows, a layer's mean score
    becomes the fraction that stays.
    """
    damping: Damping = 1e-2
    """Added to the Hessian, as a multiple of its mean diagonal."""
    head_score: Literal["cost", "times-cost"] = "cost"
    """With `allocation: threshold`, `cost`: a head's score is compared as it is and its parameters
    are what it costs; `times-cost`: it is multiplied by the parameters of a head over those of a
    neuron first, the paper's formula as printed.
    """

    @property
    def comparable_scores(self) -> bool:
        """The paper's threshold is one for the whole model."""
        return True

    @property
    def read_by_threshold(self) -> tuple[str, ...]:
        """How scores of heads and channels are compared."""
        return ("head_score",)

    def weighted_scores(
        self, scores: Mapping[str, Sequence[float]], unit_parameters: Mapping[str, int]
    ) -> dict[str, list[float]]:
        """For `times-cost` the scores of all groups but the one with the smallest units times what
        a unit has of parameters, in units of that group.
        """
        weighted = super().weighted_scores(scores, unit_parameters)
        least = min(unit_parameters.values())
        if self.head_score == "times-cost":
            for name, units in weighted.items():
                if unit_parameters[name] > least:
                    weighted[name] = [score * unit_parameters[name] / least for score in units]
        return weighted

    def ranking_flops(self, group: RankedGroup) -> int:
        """The Hessian and its factor: 2 D F^2 + F^3/3."""
        return group.product_flops + 2 * group.hidden * group.width**2 + group.width**3 // 3

    def ranking_bytes(self, group: RankedGroup) -> int:
        """The Hessian: F^2 8."""
        return group.product_bytes + 8 * group.width**2
