"""Options of masks: zeros inside the matrices, of the whole model or of what a cut leaves."""

from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from rayprune.specs.methods.options import SITES, Damping, Masks, MethodOptions, Site
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.specs.section import one_of

HALF = 0.5
DEFAULT_DAMPING = 1e-2
"""SparseGPT's."""

if TYPE_CHECKING:
    Inner: TypeAlias = MethodOptions
else:
    Inner = one_of(RANKINGS, "stat")


class SparseOptions(MethodOptions):
    """Masks: weights become zero where they are cheapest, and with `obs` those that stay are
    corrected (SparseGPT, arXiv 2301.00774). With `inner` units go first.
    """

    name: Literal["sparse"] = "sparse"
    inner: Inner | None = None
    """The method, one that ranks, by which units go first, until the budget is met; of
    `budget.memory` the zeros give their part; null: no unit goes.
    """
    pattern: Literal["2:4", "4:8", "unstructured"] = "2:4"
    """Where zeros lie. `2:4`, `4:8`: at least two of every four (four of every eight) weights of
    an output that read neighbouring inputs; `unstructured`: anywhere.
    """
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """`unstructured`: fraction of every matrix that becomes zero; null: 0.5."""
    score: Literal["magnitude", "wanda", "obs"] = "obs"
    """Which weights go. `magnitude`: the smallest; `wanda` (arXiv 2306.11695): the smallest times
    the norm of what they read; `obs`, SparseGPT's solution: those whose loss costs least once the
    others make up for it, which they then do.
    """
    sites: Literal["all"] | Annotated[list[Site], Field(min_length=1)] = "all"
    """The matrices that get zeros, by what they read: `qkv`; `o`, the attention's output; `up`,
    and gate beside it; `down`.
    """
    damping: Damping | None = None
    """`obs`: ridge added to the Gram matrix, as a multiple of its mean diagonal; null: 0.01."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.sparsity is not None and self.pattern != "unstructured":
            raise ValueError(
                f"sparsity: pattern {self.pattern} says it; leave it out, or set pattern:"
                " unstructured"
            )
        if self.damping is not None and self.score != "obs":
            raise ValueError(f"damping: score {self.score} corrects nothing; leave it out")
        return self

    @property
    def cuts_first(self) -> MethodOptions | None:
        """The inner method."""
        return self.inner

    @property
    def masks(self) -> Masks:
        """What becomes zero, and how it is chosen."""
        group = None if self.pattern == "unstructured" else int(self.pattern.partition(":")[2])
        chosen = SITES if self.sites == "all" else self.sites
        return Masks(
            pattern=self.pattern,
            score=self.score,
            sites=tuple(site for site in SITES if site in chosen),
            group=group,
            sparsity=HALF if group else self.sparsity or HALF,
            damping=(self.damping or DEFAULT_DAMPING) if self.score == "obs" else 0.0,
        )
