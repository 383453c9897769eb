"""What many tests need, once."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.model.config import Config
from rayprune.workers.model.families import family_named, model_types
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.mixture import Mixture

SCRATCH = Scratch(torch.device("cpu"), None)
"""Plain memory on the CPU."""


def quiet(event: dict[str, Any]) -> None:
    """Show nothing."""


def workers_alive() -> list[int]:
    """Process ids of the workers that live, as Ray has them: one that it has told to go may be a
    process for some time yet.
    """
    import ray  # fast tests have no use for it

    actors = ray._private.state.actors().values()
    return [
        actor["Pid"]
        for actor in actors
        if actor["State"] == "ALIVE" and actor["ActorClassName"].startswith("Worker")
    ]


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test that sees the same with each of them: only these few are fast tests."""
    return [
        pytest.param(value, marks=[] if value in quick else pytest.mark.slow) for value in values
    ]


def stored_numbers(network: Any) -> int:
    """Numbers of the tensors that a network is loaded from, tied ones counted once."""
    tensors = network.state_dict(keep_vars=True).values()
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())


def mixtures() -> list[str]:
    """Families with experts, by themselves and not in a larger model."""
    found = [name for name in model_types() if isinstance(family_named(name), Mixture)]
    return [*found, "gemma4_text-experts"]


def has_experts(model_type: str) -> bool:
    """Whether a family is a mixture, or holds one."""
    family = family_named(model_type)
    return isinstance(getattr(family, "text", family), Mixture)


OF_EACH_KIND = ("llama", "gemma2", "gpt2", "gpt_neox", "falcon", "opt", "bloom")
"""Plain; norms behind blocks; transposed; written as another; in place; no block; nothing cut."""


def families(*but: str) -> list[str]:
    """One family of each kind, for a test that sees the same with every family. What the contracts
    promise is seen of all of them.
    """
    return [name for name in OF_EACH_KIND if name not in but]


def normalised() -> list[str]:
    """Families that do not add their blocks' outputs as they are."""
    found = {name: family_named(name) for name in model_types()}
    return [
        name
        for name, family in found.items()
        if isinstance(family, Decoder) and family.scale(Config({})) is None
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
