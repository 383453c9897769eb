"""Options of STAT."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.methods.options import MethodOptions, RankedGroup


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

    shrinkage: float = Field(default=0.0, ge=0.0, le=1.0)
    """Part of the correlations between activations that the pivoting leaves out of account. 0, the
    paper's: all count as on the calibration text; 1: units are chosen by their energy alone. In
    between the choice holds better on other text.
    """

    @model_validator(mode="after")
    def _gradients_are_measured(self) -> Self:
        if self.scale != "gradients":
            self.leave_out(f"scale: {self.scale} measures no gradients", "gradient_samples")
        return self

    @property
    def needs_rows(self) -> bool:
        """For `qr`."""
        return self.factorization == "qr"

    @property
    def gradient_windows(self) -> int:
        """For `scale: gradients`."""
        return self.gradient_samples if self.scale == "gradients" else 0

    def ranking_flops(self, group: RankedGroup) -> int:
        """Pivoting: F^3/3 on a Gram matrix, 4 n^2 F on rows."""
        if group.in_rows and not self.shrinkage:
            return 4 * group.rows**2 * group.width
        return group.product_flops + group.width**3 // 3

    def ranking_bytes(self, group: RankedGroup) -> int:
        """Pivoting destroys a scaled copy: F^2 8, or of rows n F 8."""
        if group.in_rows and not self.shrinkage:
            return 8 * group.width * group.rows
        return group.product_bytes + 8 * group.width**2
