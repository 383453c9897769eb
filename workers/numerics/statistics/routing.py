"""What is remembered of a layer's experts: how often each is chosen, and how much it adds to the
block's output.

Letters: E experts, n tokens of one expert, D hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from rayprune.workers.numerics.codec import from_array, to_array
from rayprune.workers.numerics.linalg import WIDE
from rayprune.workers.numerics.statistics.protocol import State, Travelling


@dataclass
class RoutingStatistic(Travelling):
    """Of every expert its tokens, and over them the sums of s |f(x)| and of (p |f(x)|)^2: p is the
    router's weight of the expert, s its share of the token's weights, f(x) the expert's output.
    fp64, on the host.
    """

    tokens_E: Tensor
    norms_E: Tensor
    energies_E: Tensor

    @classmethod
    def empty(cls, experts: int) -> Self:
        """Of no tokens."""
        return cls(
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts, dtype=WIDE),
            torch.zeros(experts, dtype=WIDE),
        )

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild what `state` wrote, in memory of its own."""
        return cls(
            from_array(state["tokens"], torch.int64).clone(),
            from_array(state["norms"], WIDE).clone(),
            from_array(state["energies"], WIDE).clone(),
        )

    def update(self, expert: int, output_nD: Tensor, weights_n: Tensor, shares_n: Tensor) -> None:
        """Add what one expert gave for the tokens of a micro-batch."""
        norms_n = torch.linalg.vector_norm(output_nD, dim=1, dtype=WIDE)
        self.tokens_E[expert] += len(norms_n)
        self.norms_E[expert] += (norms_n * shares_n.to(WIDE)).sum().cpu()
        self.energies_E[expert] += (norms_n * weights_n.to(WIDE)).square().sum().cpu()

    def merge(self, other: Self) -> Self:
        """The sums of both."""
        return type(self)(
            self.tokens_E + other.tokens_E,
            self.norms_E + other.norms_E,
            self.energies_E + other.energies_E,
        )

    def finished(self) -> Self:
        """As it is."""
        return self

    def state(self) -> State:
        """As arrays."""
        return {
            "tokens": to_array(self.tokens_E),
            "norms": to_array(self.norms_E),
            "energies": to_array(self.energies_E),
        }

    def is_finite(self) -> bool:
        """Whether every output was."""
        return bool(self.energies_E.isfinite().all())

    def scores(self, score: Literal["reap", "frequency"]) -> Tensor:
        """What an expert is worth (E).

        `reap` is the mean of s |f(x)| over the tokens that are routed to the expert
        (Router-weighted Expert Activation Pruning, arXiv 2510.13999, with weights that sum to 1 for
        every token, as in its released code); of no tokens 0. `frequency`
        is the number of those tokens.
        """
        if score == "frequency":
            return self.tokens_E.to(WIDE)
        return self.norms_E / self.tokens_E.clamp(min=1)

    def lost(self, kept: Iterable[int]) -> float:
        """The relative error of the block's output if these experts alone stay, as far as outputs
        of experts are orthogonal and no other expert takes over.
        """
        total = float(self.energies_E.sum())
        kept_energy = float(self.energies_E[list(kept)].sum())
        return (max(0.0, total - kept_energy) / total) ** 0.5 if total > 0 else 0.0


def best_experts(scores_E: Tensor, count: int, parts: int) -> Tensor:
    """So many experts with the largest scores, ascending; the same number from each of `parts`
    equal parts. Ties go to the lower number.
    """
    by_part = scores_E.reshape(parts, -1)
    order = torch.argsort(by_part, dim=1, descending=True, stable=True)[:, : count // parts]
    first = torch.arange(parts)[:, None] * by_part.shape[1]
    return (order + first).flatten().sort().values
