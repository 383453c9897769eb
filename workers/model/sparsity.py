"""`sparsity.json` beside a model's weights: which of its matrices have zeros, and how they came
there. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayprune.specs.errors import ModelError
from rayprune.specs.methods.options import Masks
from rayprune.workers.model.folder import read_json

SPARSITY_FILE = "sparsity.json"
SEMI_STRUCTURED = "2:4"
"""The pattern that tensor cores multiply."""
FAST_ROWS, FAST_COLUMNS = 32, 64
"""What rows and columns are multiples of there (cuSPARSELt and CUTLASS, 16-bit numbers)."""


def is_semi_structured(shape: Sequence[int], transposed: bool) -> bool:
    """Whether a GPU may hold a 2:4 matrix of this shape without its zeros."""
    rows, columns = shape
    return not transposed and rows % FAST_ROWS == 0 and columns % FAST_COLUMNS == 0


def bytes_not_held(shape: Sequence[int], element_bytes: int, transposed: bool) -> int:
    """What a GPU saves of a 2:4 matrix: of four 16-bit numbers it holds two and two bits for the
    place of each, 36 bits of 64. None of numbers of other types.
    """
    if element_bytes != 2 or not is_semi_structured(shape, transposed):
        return 0
    return shape[0] * shape[1] * element_bytes * 7 // 16


@dataclass(frozen=True)
class Zeros:
    """Those of one matrix."""

    zeros: int
    of: int
    """Weights of the matrix."""
    transposed: bool
    """Whether it is (in, out)."""


@dataclass(frozen=True)
class Sparsity:
    """What a folder says of its zeros."""

    pattern: str
    """As the job calls it."""
    group: int | None
    """Zeros are counted in so many neighbouring inputs of an output; None: in whole matrices."""
    sparsity: float
    """Fraction of those that is zero, at least."""
    score: str
    damping: float
    tensors: Mapping[str, Zeros]
    """The matrices, by their names in the files."""
    layers: Sequence[Mapping[str, Mapping[str, float]]]
    """Of every layer and site the errors: `held_out_error`, and `mask_error` if no weight that
    stays had been corrected."""


def sparsity_document(
    masks: Masks, layers: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> dict[str, Any]:
    """The file's content: of every layer what was decided of its sites, and its matrices' zeros."""
    errors = ("training_error", "held_out_error", "mask_error")
    return asdict(
        Sparsity(
            pattern=masks.pattern,
            group=masks.group,
            sparsity=masks.sparsity,
            score=masks.score,
            damping=masks.damping,
            tensors={name: Zeros(**told) for _, zeros in layers for name, told in zeros.items()},
            layers=[
                {site: {error: told[error] for error in errors} for site, told in sites.items()}
                for sites, _ in layers
            ],
        )
    )


def read_sparsity(folder: Path) -> Sparsity:
    """What a folder says of its zeros.

    Raises:
        ModelError: nothing, or nothing that can be read.
    """
    if not (folder / SPARSITY_FILE).exists():
        raise ModelError(
            f"{folder}: no {SPARSITY_FILE} here; name a folder that a job with method sparse has"
            " written"
        )
    told: Any = read_json(folder / SPARSITY_FILE)
    try:
        tensors = {name: Zeros(**zeros) for name, zeros in told.pop("tensors").items()}
        return Sparsity(tensors=tensors, **told)
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder / SPARSITY_FILE}: is damaged ({error}); run the job again to write it anew"
        ) from None
