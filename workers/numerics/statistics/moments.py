"""Sums that go beside the products of the activations: of the columns, and of what the outputs
lack.

Letters: T tokens, F width, D hidden.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics import linalg
from rayprune.workers.numerics.codec import from_array
from rayprune.workers.numerics.linalg import WIDE
from rayprune.workers.numerics.statistics.protocol import State, Tensors


@dataclass(frozen=True)
class Moments:
    """Sums of the columns of Z over so many tokens: what Z'Z does not tell. fp32 in a micro-batch,
    fp64 over them.
    """

    sums_F: Tensor
    num_tokens: int

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Self:
        """Of no tokens."""
        return cls(torch.zeros(width, dtype=WIDE, device=device), 0)

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Self:
        """Rebuild what `tensors` gave."""
        return cls(tensors["sums"], int(tensors["num_tokens"]))

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> Self:
        """Rebuild what a statistic's state holds of it."""
        return cls(from_array(state["sums"], WIDE).to(device), int(state["num_tokens"]))

    def plus(self, z_TF: Tensor) -> "Moments":
        """With the tokens of one micro-batch."""
        sums_F = z_TF.sum(0, dtype=torch.promote_types(z_TF.dtype, torch.float32))
        return Moments(self.sums_F + sums_F, self.num_tokens + len(z_TF))

    def merge(self, other: "Moments") -> "Moments":
        """With the tokens of another part."""
        return Moments(self.sums_F + other.sums_F, self.num_tokens + other.num_tokens)

    def variance(self, energy_F: Tensor) -> Tensor:
        """|z_j|^2 / T - mean^2, not below zero."""
        tokens = max(1, self.num_tokens)
        return (energy_F / tokens - (self.sums_F / tokens).square()).clamp(min=0.0)

    def tensors(self) -> Tensors:
        """As tensors."""
        return {"sums": self.sums_F, "num_tokens": torch.tensor(self.num_tokens)}


@dataclass
class Drift:
    """What the outputs of a consumer lack: Z'E and the energies of the columns of E (T x D),
    fp64.
    """

    cross_FD: Tensor
    energy_D: Tensor

    @classmethod
    def empty(cls, width: int, outputs: int, scratch: Scratch) -> Self:
        """Of no tokens."""
        return cls(
            scratch.zeros(width, outputs, dtype=WIDE),
            torch.zeros(outputs, dtype=WIDE, device=scratch.device),
        )

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Self | None:
        """Rebuild what `tensors` gave; None where a statistic has none."""
        return cls(tensors["cross"], tensors["drift_energy"]) if "cross" in tensors else None

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self | None:
        """Rebuild what a statistic's state holds of it, in memory of its own; None where it holds
        nothing.
        """
        if "cross" not in state:
            return None
        cross_FD = from_array(state["cross"], WIDE)
        copy_FD = scratch.empty(*cross_FD.shape, dtype=WIDE).copy_(cross_FD)
        return cls(copy_FD, from_array(state["drift_energy"], WIDE).to(scratch.device, copy=True))

    def update(self, z_TF: Tensor, drift_TD: Tensor) -> None:
        """Add one micro-batch. Cost: 2 T F D flops."""
        linalg.add_cross_(self.cross_FD, z_TF, drift_TD)
        self.energy_D += torch.linalg.vector_norm(drift_TD, dim=0, dtype=WIDE).square()

    def merge_(self, other: Self) -> None:
        """Add the other's sums."""
        self.cross_FD += other.cross_FD
        self.energy_D += other.energy_D

    def of_outputs(self, rows: slice) -> "Drift":
        """That of some outputs."""
        return Drift(self.cross_FD[:, rows], self.energy_D[rows])

    def tensors(self) -> Tensors:
        """As tensors."""
        return {"cross": self.cross_FD, "drift_energy": self.energy_D}
