"""What many tests need, once."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch

SCRATCH = Scratch(torch.device("cpu"), None)
"""Plain memory on the CPU."""


def quiet(event: dict[str, Any]) -> None:
    """Show nothing."""


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test that sees the same with each of them: only these few are fast tests."""
    return [
        pytest.param(value, marks=[] if value in quick else pytest.mark.slow) for value in values
    ]


def correlated(
    tokens: int,
    width: int,
    hidden: int,
    seed: int = 0,
    rank: int | None = None,
    mixed: float = 0.3,
    mean: float = 0.0,
    uneven: bool = False,
) -> tuple[Tensor, Tensor]:
    """Activations Z (T, F) whose columns are correlated, and a weight (D, F), fp64.

    `rank` is that of Z, `mixed` how much of other columns is in a column, `mean` the columns';
    `uneven` columns are of unlike size.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(rank or width, width)
    if rank is None:
        mixing = torch.eye(width, dtype=torch.float64) + mixed * mixing
    z_TF = normal(tokens, rank or width) @ mixing
    if uneven:
        z_TF *= torch.rand(width, generator=generator, dtype=torch.float64) + 0.1
    return z_TF + mean, normal(hidden, width)
