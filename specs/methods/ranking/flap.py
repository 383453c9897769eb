"""Options of FLAP's score."""

from typing import Literal

from rayprune.specs.methods.options import MethodOptions


class FlapOptions(MethodOptions):
    """FLAP's score (arXiv 2312.11983): variance of a channel times the squared norm of the weights
    that read it. A baseline.
    """

    name: Literal["flap"] = "flap"

    @property
    def comparable_scores(self) -> bool:
        """Scores are standardised within each group of each layer, and then sorted together."""
        return True
