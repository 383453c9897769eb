"""Options of the pruning methods: one class per method, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag

from specs.section import Section, named, told_apart_by_name

Damping = Annotated[float, Field(gt=0.0, le=1e6)]


class MethodOptions(Section):
    """Base of every method's options."""

    @property
    def needs_rows(self) -> bool:
        """Whether rows of activations are kept instead of a Gram matrix, however many tokens there are."""
        return False

    @property
    def comparable_scores(self) -> bool:
        """Whether the scores of units of different layers can be compared."""
        return False


class StatOptions(MethodOptions):
    """STAT (arXiv 2406.00061): column-pivoted QR picks heads and neurons, an interpolative correction folds into the next weight."""

    name: Literal["stat"] = "stat"
    factorization: Literal["gram", "qr"] = "gram"
    """`gram`: pivoted Cholesky of the Gram matrix (fast); `qr`: tall-skinny QR, then column-pivoted QR of R (exact)."""

    @property
    def needs_rows(self) -> bool:
        """For `qr`."""
        return self.factorization == "qr"


class NumericalOptions(MethodOptions):
    """Numerical Pruning (arXiv 2412.12441): Newton scores of attention and MLP, closed-form compensation."""

    name: Literal["numerical"] = "numerical"
    penalty: float = Field(default=1e4, gt=0.0)
    """Weight (lambda) of the constraint on how many units stay; as it grows, a layer's mean score becomes the fraction that stays."""
    damping: Damping = 1e-2
    """Added to the Hessian, as a multiple of its mean diagonal."""
    head_score: Literal["cost", "times-cost"] = "cost"
    """With `allocation: threshold`, `cost`: a head's score is compared as it is and its parameters are what it costs; `times-cost`: it is
    multiplied by the parameters of a head over those of a neuron first, the paper's formula as printed."""

    @property
    def comparable_scores(self) -> bool:
        """The paper's threshold is one for the whole model."""
        return True


class ObsOptions(MethodOptions):
    """Optimal Brain Surgeon for units (ZipLM, OSSCAR): the unit whose loss costs least after the exact refit goes first."""

    name: Literal["obs"] = "obs"
    rounds: int = Field(default=32, ge=1, le=100_000)
    """Rounds of removal; scores are exact at the start of each. As many as there are units: one at a time."""
    swaps: int = Field(default=0, ge=0, le=100_000)
    """Exchanges of a removed unit for a kept one that are tried afterwards, as long as each helps."""
    damping: Damping = 1e-2
    """Ridge of the refit behind the scores, as a multiple of the mean diagonal."""


class FlapOptions(MethodOptions):
    """FLAP's score (arXiv 2312.11983): variance of a channel times the squared norm of the weights that read it. A baseline."""

    name: Literal["flap"] = "flap"

    @property
    def comparable_scores(self) -> bool:
        """Scores are standardised within each group of each layer, and then sorted together."""
        return True


class WandaOptions(MethodOptions):
    """Wanda's score for structures (arXiv 2306.11695, Wanda-sp): norm of a channel times the weights that read it. A baseline."""

    name: Literal["wanda"] = "wanda"


MethodSpec = Annotated[
    Annotated[
        Annotated[StatOptions, Tag("stat")]
        | Annotated[NumericalOptions, Tag("numerical")]
        | Annotated[ObsOptions, Tag("obs")]
        | Annotated[FlapOptions, Tag("flap")]
        | Annotated[WandaOptions, Tag("wanda")],
        told_apart_by_name("stat"),
    ],
    BeforeValidator(named),
]
