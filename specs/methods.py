"""Options of the pruning methods: one class per method, told apart by `name`."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag

from rayprune.specs.section import Section, named, told_apart_by_name
from rayprune.specs.training import TrainingSpec

Damping = Annotated[float, Field(gt=0.0, le=1e6)]


class MethodOptions(Section):
    """Base of every method's options."""

    @property
    def needs_rows(self) -> bool:
        """Whether rows of activations are kept instead of a Gram matrix, however many tokens there
        are.
        """
        return False

    @property
    def comparable_scores(self) -> bool:
        """Whether the scores of units of different layers can be compared."""
        return False

    @property
    def gradient_windows(self) -> int:
        """Calibration windows on which gradients of the loss are measured; 0: they are not
        needed.
        """
        return 0

    @property
    def selector(self) -> "MethodOptions":
        """The method that chooses the units of a layer."""
        return self

    @property
    def selects_first(self) -> bool:
        """Whether units are chosen before anything else is done."""
        return False

    @property
    def removes_layers(self) -> bool:
        """Whether whole layers go, and nothing else."""
        return False

    @property
    def trainings(self) -> tuple[TrainingSpec, ...]:
        """The trainings before the cut."""
        return ()

    @property
    def trains_layers_alone(self) -> bool:
        """Whether that training takes every layer by itself."""
        return False


class StatOptions(MethodOptions):
    """STAT (arXiv 2406.00061): column-pivoted QR picks heads and neurons, an interpolative
    correction folds into the next weight.
    """

    name: Literal["stat"] = "stat"
    factorization: Literal["gram", "qr"] = "gram"
    """`gram`: pivoted Cholesky of the Gram matrix (fast); `qr`: tall-skinny QR, then column-pivoted
    QR of R (exact).
    """
    scale: Literal["weights", "gradients"] = "weights"
    """What an activation counts for in the pivoting. `weights`, the paper's: the norm of the next
    weight's column; `gradients`: the root mean square of the loss's gradient with respect to it,
    for one backward pass through the dense model, layer by layer.
    """
    gradient_samples: int = Field(default=64, ge=1)
    """`gradients`: calibration windows, spread evenly, on which they are measured; at most all of
    them.
    """

    @property
    def needs_rows(self) -> bool:
        """For `qr`."""
        return self.factorization == "qr"

    @property
    def gradient_windows(self) -> int:
        """For `scale: gradients`."""
        return self.gradient_samples if self.scale == "gradients" else 0


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


class FlapOptions(MethodOptions):
    """FLAP's score (arXiv 2312.11983): variance of a channel times the squared norm of the weights
    that read it. A baseline.
    """

    name: Literal["flap"] = "flap"

    @property
    def comparable_scores(self) -> bool:
        """Scores are standardised within each group of each layer, and then sorted together."""
        return True


class WandaOptions(MethodOptions):
    """Wanda's score for structures (arXiv 2306.11695, Wanda-sp): norm of a channel times the
    weights that read it. A baseline.
    """

    name: Literal["wanda"] = "wanda"


class DressOptions(MethodOptions):
    """DReSS (arXiv 2501.17905): what will go is chosen first and driven towards zero while the
    model is trained; then it is cut.
    """

    name: Literal["dress"] = "dress"
    mask: Literal["random", "stat", "numerical", "obs", "flap", "wanda"] = "random"
    """How the units that will go are chosen: at random, or by a method, with its default options,
    on the dense model.
    """
    scope: Literal["model", "layer"] = "model"
    """`model`: all layers are trained together on the language-model loss, as in the paper;
    `layer`: every layer alone, towards its own output in the dense model, many at a time, in the
    memory of one layer.
    """
    norm: Literal["l1", "l2"] = "l2"
    """Norm of a unit's weights in the penalty."""
    strength: float = Field(default=0.5, gt=0.0, le=1e3)
    """How far the penalty takes the norm of a unit down over the whole training, if nothing else
    moves it; 1: to zero. At half its norm an eighth of a channel's output is left, a product of
    three weights; the correction takes that.
    """
    seed: int = Field(default=0, ge=0)
    """Seed of a random mask."""
    training: TrainingSpec = TrainingSpec()
    """The training."""

    @property
    def selector(self) -> MethodOptions:
        """The method that chooses; for a random mask the probe of shapes looks at STAT's choice."""
        return SELECTORS.get(self.mask, StatOptions())

    @property
    def selects_first(self) -> bool:
        """The mask is fixed before the training."""
        return True

    @property
    def trainings(self) -> tuple[TrainingSpec, ...]:
        """One, with a penalty on what will go."""
        return (self.training,)

    @property
    def trains_layers_alone(self) -> bool:
        """For `scope: layer`."""
        return self.scope == "layer"


class TrspOptions(MethodOptions):
    """TRSP (arXiv 2505.18232): gates choose the layers, a penalty on their updates moves what they
    do elsewhere, then they go.
    """

    name: Literal["trsp"] = "trsp"
    gate_strength: float = Field(default=5e-3, ge=0.0)
    """Weight of the l1 norm of the gates (lambda 1) beside the language-model loss."""
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
    norm: Literal["l1", "l2"] = "l2"
    """`penalty`: norm of an update."""
    protect_first: int = Field(default=0, ge=0)
    """So many of the first layers stay."""
    protect_last: int = Field(default=0, ge=0)
    """So many of the last layers stay."""
    gates: TrainingSpec = TrainingSpec(learning_rate=1e-2)
    """The training of the gates, once for every layer that goes."""
    training: TrainingSpec = TrainingSpec()
    """The training of all weights."""

    @property
    def removes_layers(self) -> bool:
        """Nothing but layers."""
        return True

    @property
    def trainings(self) -> tuple[TrainingSpec, ...]:
        """Gates, then all weights."""
        return (self.gates, self.training)


SELECTORS: Mapping[str, MethodOptions] = {
    options.name: options
    for options in (StatOptions(), NumericalOptions(), ObsOptions(), FlapOptions(), WandaOptions())
}
"""The methods that choose units of one layer, with their default options."""

MethodSpec = Annotated[
    Annotated[
        Annotated[StatOptions, Tag("stat")]
        | Annotated[NumericalOptions, Tag("numerical")]
        | Annotated[ObsOptions, Tag("obs")]
        | Annotated[FlapOptions, Tag("flap")]
        | Annotated[WandaOptions, Tag("wanda")]
        | Annotated[DressOptions, Tag("dress")]
        | Annotated[TrspOptions, Tag("trsp")],
        told_apart_by_name("stat"),
    ],
    BeforeValidator(named),
]
