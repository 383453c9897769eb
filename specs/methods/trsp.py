"""Options of TRSP."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.methods.options import MethodOptions, TakeOver
from rayprune.specs.training import Loss, Norm, TrainingSpec


class TrspOptions(MethodOptions):
    """TRSP (arXiv 2505.18232): gates choose the layers, a penalty on their updates moves what they
    do elsewhere, then they go.
    """

    name: Literal["trsp"] = "trsp"
    gate_strength: float = Field(default=5e-3, ge=0.0)
    """Weight of the l1 norm of the gates (lambda 1) beside the language-model loss."""
    loss: Loss = "lm"
    """What is minimised in both trainings: the text, as in the paper, or the divergence from the
    dense model's next-token distribution.
    """
    transfer: Literal["shrink", "penalty"] = "shrink"
    """How the layers that will go hand over what they do; `penalty`, the paper's: a penalty on the
    size of their updates beside the loss; `shrink`, its decoupled form: their updates are scaled
    down while all weights are trained on the loss alone.
    """
    shrink_strength: float = Field(default=1.5, gt=0.0, le=1e3)
    """`shrink`: how far the updates are scaled down over the whole training; 1: to zero just at its
    end, 2: by its middle.
    """
    update_strength: float = Field(default=1e-3, ge=0.0)
    """`penalty`: weight of the updates of the layers that will go (lambda 2)."""
    norm: Norm = "l2"
    """`penalty`: norm of an update."""
    protect_first: int = Field(default=0, ge=0)
    """So many of the first layers stay."""
    protect_last: int = Field(default=0, ge=0)
    """So many of the last layers stay."""
    gates: TrainingSpec = TrainingSpec(learning_rate=1e-2)
    """The training of the gates, once for every layer that goes."""
    training: TrainingSpec = TrainingSpec()
    """The training of all weights."""

    @model_validator(mode="after")
    def _options_of_the_transfer(self) -> Self:
        unread = ("shrink_strength",) if self.transfer == "penalty" else ("update_strength", "norm")
        self.leave_out(f"transfer: {self.transfer} does not read it", *unread)
        return self

    @property
    def before_cut(self) -> TakeOver:
        """Gates, then all weights."""
        strengths = {"shrink": self.shrink_strength, "penalty": self.update_strength}
        return TakeOver(
            loss=self.loss,
            gates=self.gates,
            gate_strength=self.gate_strength,
            training=self.training,
            transfer=self.transfer,
            strength=strengths[self.transfer],
            norm=self.norm,
            protect_first=self.protect_first,
            protect_last=self.protect_last,
        )
