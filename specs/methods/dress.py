"""Options of DReSS."""

from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from rayprune.specs.methods.options import DriveOut, MethodOptions
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.specs.section import Seed
from rayprune.specs.training import Loss, Norm, TrainingSpec

if TYPE_CHECKING:
    Mask: TypeAlias = str
else:
    Mask = Literal[("random", *RANKINGS)]


class DressOptions(MethodOptions):
    """DReSS (arXiv 2501.17905): what will go is chosen first and driven towards zero while the
    model is trained; then it is cut.
    """

    name: Literal["dress"] = "dress"
    mask: Mask = "random"
    """How the units that will go are chosen: at random, or by a method, with its default options,
    on the dense model.
    """
    scope: Literal["model", "layer"] = "model"
    """`model`: all layers are trained together on the language-model loss, as in the paper;
    `layer`: every layer alone, towards its own output in the dense model, many at a time, in the
    memory of one layer.
    """
    loss: Loss = "lm"
    """What is minimised beside the penalty: the text, as in the paper, or the divergence from the
    dense model's next-token distribution.
    """
    norm: Norm = "l2"
    """Norm of a unit's weights in the penalty."""
    strength: float = Field(default=0.5, gt=0.0, le=1e3)
    """How far the penalty takes the norm of a unit down over the whole training, if nothing else
    moves it; 1: to zero. At half its norm an eighth of a channel's output is left, a product of
    three weights; the correction takes that.
    """
    seed: Seed = 0
    """Seed of a random mask."""
    training: TrainingSpec = TrainingSpec()
    """The training."""

    @property
    def selector(self) -> MethodOptions:
        """The method that chooses; for a random mask the probe of shapes looks at STAT's choice."""
        return StatOptions() if self.mask == "random" else RANKINGS[self.mask].model_validate({})

    @property
    def needs_rows(self) -> bool:
        """As the method that chooses."""
        return self.selector.needs_rows

    @property
    def before_cut(self) -> DriveOut:
        """One training, with a penalty on what will go."""
        seed = self.seed if self.mask == "random" else None
        each_layer = self.scope == "layer"
        return DriveOut(self.training, self.strength, self.norm, self.loss, each_layer, seed)

    @model_validator(mode="after")
    def _loss_of_a_whole_model(self) -> Self:
        if self.scope == "layer" and self.given("loss"):
            raise ValueError(
                "loss with scope: layer: it means nothing to a layer that is trained alone, towards"
                " its own output; leave it out, or set scope: model"
            )
        return self

    @model_validator(mode="after")
    def _seed_of_a_random_mask(self) -> Self:
        if self.mask != "random":
            self.leave_out(f"mask: {self.mask} draws nothing at random", "seed")
        return self
