"""Options of OBS for units."""

from typing import Literal

from pydantic import Field

from rayprune.specs.methods.options import Damping, MethodOptions, RankedGroup


class ObsOptions(MethodOptions):
    """Optimal Brain Surgeon for units (ZipLM, OSSCAR): the unit whose loss costs least after the
    exact refit goes first.
    """

    name: Literal["obs"] = "obs"
    rounds: int = Field(default=32, ge=1, le=100_000)
    """Rounds of removal; scores are exact at the start of each. As many as there are units: one at
    a time.
    """
    swaps: int = Field(default=0, ge=0, le=100_000)
    """Exchanges of a removed unit for a kept one that are tried afterwards, as long as each
    helps.
    """
    damping: Damping = 1e-2
    """Ridge of the refit behind the scores, as a multiple of the mean diagonal."""

    def ranking_flops(self, group: RankedGroup) -> int:
        """An inverse, F^3, and 2 P F (F + D) for P columns removed."""
        sweeps = 2 * group.removed * group.width * (group.width + group.hidden)
        return group.product_flops + group.width**3 + sweeps

    def ranking_bytes(self, group: RankedGroup) -> int:
        """The swept matrix and the weight: F (F + D) 8."""
        return group.product_bytes + 8 * group.width * (group.width + group.hidden)
