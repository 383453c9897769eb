"""Options of the pruning methods: one class per method, told apart by `name`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class StatOptions(BaseModel):
    """STAT (arXiv 2406.00061): column-pivoted QR picks heads and neurons, an interpolative correction folds into the next weight."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Literal["stat"] = "stat"
    factorization: Literal["gram", "qr"] = "gram"
    """`gram`: pivoted Cholesky of the Gram matrix (fast); `qr`: tall-skinny QR, then column-pivoted QR of R (exact)."""


MethodSpec = StatOptions  # becomes a union, discriminated on `name`, with the second method
