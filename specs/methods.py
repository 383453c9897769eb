"""Options of the pruning methods: one class per method, told apart by `name`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Damping = Annotated[float, Field(gt=0.0, le=1e6)]


class MethodOptions(BaseModel):
    """Base of every method's options: frozen and closed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def needs_rows(self) -> bool:
        """Whether rows of activations are kept instead of a Gram matrix, however many tokens there are."""
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


class WandaOptions(MethodOptions):
    """Wanda's score for structures (arXiv 2306.11695, Wanda-sp): norm of a channel times the weights that read it. A baseline."""

    name: Literal["wanda"] = "wanda"


def _name(options: Any) -> str:
    """The method a section means; STAT where it names none."""
    return str(options.get("name", "stat") if isinstance(options, Mapping) else getattr(options, "name", "stat"))


MethodSpec = Annotated[
    Annotated[StatOptions, Tag("stat")]
    | Annotated[NumericalOptions, Tag("numerical")]
    | Annotated[ObsOptions, Tag("obs")]
    | Annotated[FlapOptions, Tag("flap")]
    | Annotated[WandaOptions, Tag("wanda")],
    Discriminator(_name),
]
