"""What a model has to keep of the one it was made from, to be pruned further."""

from typing import Annotated

from pydantic import Field

from rayprune.specs.section import Section


class GateSpec(Section):
    """What a step must keep of the original model, on windows of the calibration text behind all
    that were calibrated or trained on. Every bound that is given holds; without any the steps are
    measured alone.
    """

    perplexity: Annotated[float, Field(gt=0.0)] | None = None
    """Perplexity, as a multiple of the original's, at most."""
    divergence: Annotated[float, Field(gt=0.0)] | None = None
    """Divergence (KL) of the next-token distribution from the original's, in nats per token, at
    most.
    """
    agreement: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of tokens for which the most likely next one is the original's, at least."""
    samples: int = Field(default=16, ge=1, le=65536)
    """Windows that are measured on, of `calibration.sequence_length` tokens."""

    def exceeded(self, perplexity: float, divergence: float, agreement: float) -> list[str]:
        """The bounds that a step with these values does not keep, in words."""
        found = []
        if self.perplexity is not None and not perplexity <= self.perplexity:
            found.append(
                f"perplexity {perplexity:.4g} times the original's, at most {self.perplexity:g}"
            )
        if self.divergence is not None and not divergence <= self.divergence:
            found.append(f"divergence {divergence:.4g} nats per token, at most {self.divergence:g}")
        if self.agreement is not None and not agreement >= self.agreement:
            found.append(f"agreement {agreement:.4g}, at least {self.agreement:g}")
        return found
