"""The Gram matrix of the activations, and corrections from it by normal equations.

Letters: T tokens, F width, D hidden, K kept columns, P pruned columns, B block of output rows.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics import linalg, pivoting
from rayprune.workers.numerics.codec import from_array
from rayprune.workers.numerics.damping import Blocks
from rayprune.workers.numerics.linalg import WIDE, Solver
from rayprune.workers.numerics.statistics.moments import Drift, Moments
from rayprune.workers.numerics.statistics.protocol import (
    Judge,
    Refit,
    State,
    Tensors,
    Travelling,
    complement,
)


@dataclass
class GramStatistic(Travelling):
    """Gram matrix Z'Z: fp32 products, fp64 sum. The fast route; squares the condition number of
    Z.
    """

    gram_FF: Tensor
    moments: Moments
    scratch: Scratch
    drift: Drift | None = None

    @classmethod
    def empty(cls, width: int, scratch: Scratch, drift_width: int = 0) -> Self:
        """The statistic of no tokens."""
        drift = Drift.empty(width, drift_width, scratch) if drift_width else None
        return cls(
            scratch.zeros(width, width, dtype=WIDE),
            Moments.empty(width, scratch.device),
            scratch,
            drift,
        )

    @classmethod
    def from_tensors(cls, tensors: Tensors, scratch: Scratch) -> Self:
        """Rebuild what `tensors` gave, in the memory of these."""
        moments, drift = Moments.from_tensors(tensors), Drift.from_tensors(tensors)
        return cls(tensors["gram"], moments, scratch, drift)

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self:
        """Rebuild what `state` wrote, in memory of its own, since sums are formed in place."""
        gram_FF = from_array(state["gram"], WIDE)
        copy_FF = scratch.empty(*gram_FF.shape, dtype=WIDE).copy_(gram_FF)
        return cls(
            copy_FF,
            Moments.from_state(state, scratch.device),
            scratch,
            Drift.from_state(state, scratch),
        )

    def update(self, z_TF: Tensor, drift_TD: Tensor | None = None) -> None:
        """Add one micro-batch. Cost: T F^2 flops, and with drift 2 T F D."""
        linalg.add_gram_(self.gram_FF, z_TF)
        self.moments = self.moments.plus(z_TF)
        if self.drift is not None and drift_TD is not None:
            self.drift.update(z_TF, drift_TD)

    def merge(self, other: Self) -> Self:
        """Add the other sum to this one."""
        self.gram_FF += other.gram_FF
        self.moments = self.moments.merge(other.moments)
        if self.drift is not None and other.drift is not None:
            self.drift.merge_(other.drift)
        return self

    def finished(self) -> Self:
        """Fill in the upper triangle."""
        linalg.mirror_(self.gram_FF)
        return self

    def tensors(self) -> Tensors:
        """The whole matrix, the moments, and the drift."""
        drift = self.drift.tensors() if self.drift else {}
        return {"gram": self.finished().gram_FF} | self.moments.tensors() | drift

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.moments.num_tokens

    @property
    def mean_energy(self) -> float:
        """Mean diagonal."""
        return float(self.column_energy.mean())

    @property
    def column_energy(self) -> Tensor:
        """The diagonal."""
        return torch.diagonal(self.gram_FF)

    @property
    def column_variance(self) -> Tensor:
        """The diagonal over the tokens, less the squared mean."""
        return self.moments.variance(self.column_energy)

    def gram(self) -> Tensor:
        """Itself."""
        return self.gram_FF

    def is_finite(self) -> bool:
        """A non-finite activation makes its diagonal entry non-finite."""
        return bool(torch.isfinite(self.column_energy).all())

    def order(self, scale_F: Tensor, unit: int, count: int, shrinkage: float = 0.0) -> Tensor:
        """Pivoted Cholesky; by blocks when a unit has more than one column."""
        return pivoting.pivot_units(self.gram_FF, scale_F, unit, count, self.scratch, shrinkage)

    def refit(self, kept_K: Tensor) -> Refit:
        """Normal equations."""
        return _GramRefit(self, kept_K)

    def energy(self, rows_BF: Tensor) -> float:
        """tr(M G M'). Cost: B F^2 flops."""
        return linalg.gram_energy(self.gram_FF, rows_BF)

    def of_outputs(self, rows: slice) -> Self:
        """With the drift of these alone."""
        return replace(self, drift=self.drift and self.drift.of_outputs(rows))

    def judge(self, weight_DF: Tensor, kept_K: Tensor) -> Judge:
        """By what is lost with the pruned columns, computed once."""
        refit = _GramRefit(self, kept_K)
        return _GramJudge(refit, refit.targets(weight_DF))


@dataclass(frozen=True)
class _GramRefit:
    """C (G_KK + ridge I) = W_P G_PK + E'Z_K."""

    statistic: GramStatistic
    kept_K: Tensor

    def targets(self, weight_DF: Tensor) -> Tensor:
        """W_P G_PK + E'Z_K, D x K. Cost: 2 D K P flops."""
        drift, scratch = self.statistic.drift, self.statistic.scratch
        pruned_P = complement(self.kept_K, len(self.statistic.gram_FF))
        gram_PK = self._gathered(pruned_P)
        targets_DK = scratch.empty(len(weight_DF), len(self.kept_K), dtype=WIDE)
        for rows, weight_BF in linalg.wide_blocks(weight_DF, scratch.device):
            torch.mm(weight_BF[:, pruned_P], gram_PK, out=targets_DK[rows])
            if drift is not None:
                targets_DK[rows] += drift.cross_FD[:, rows].index_select(0, self.kept_K).T
        return targets_DK

    def solver(self, ridge: float) -> Solver:
        """Cholesky of a copy of G_KK."""
        return linalg.cholesky_solver(self._gathered(self.kept_K), ridge)

    def misfit(self, change_BK: Tensor, target_BM: Tensor, ridge: float) -> float:
        """By the normal equations, with b what is to be made up for: |Z_K C' - b|^2 - |b|^2 =
        -<C, b'Z_K> - ridge |C|^2. Accurate to about 1e-16 |b|^2.
        """
        return -float((change_BK * target_BM).sum()) - ridge * float(change_BK.square().sum())

    def remainders(self, weight_DF: Tensor) -> Blocks:
        """|b|^2 = |Z_P W_P' + E|^2. Cost: D P^2 flops."""
        gram_FF, drift, found = self.statistic.gram_FF, self.statistic.drift, []
        pruned_P = complement(self.kept_K, len(gram_FF))
        for rows, weight_BF in linalg.wide_blocks(weight_DF, gram_FF.device):
            weight_BP = weight_BF[:, pruned_P]
            energy = linalg.gram_energy_of(gram_FF, pruned_P, weight_BP)
            if drift is not None:
                cross_PB = drift.cross_FD[:, rows].index_select(0, pruned_P)
                energy += 2 * float((weight_BP * cross_PB.T).sum())
                energy += float(drift.energy_D[rows].sum())
            found.append(max(0.0, energy))
        return tuple(found)

    def _gathered(self, rows: Tensor) -> Tensor:
        out = self.statistic.scratch.empty(len(rows), len(self.kept_K), dtype=WIDE)
        return linalg.gather_(out, self.statistic.gram_FF, rows, self.kept_K)


@dataclass(frozen=True)
class _GramJudge:
    """|Z_K C' - b|^2 - |b|^2 = tr(C G_KK C') - 2 <C, b'Z_K>. Accurate to about 1e-16 |b|^2."""

    refit: _GramRefit
    targets_DK: Tensor

    def misfit(self, rows: slice, weight_BF: Tensor, change_BK: Tensor) -> float:
        """Cost: B K^2 flops."""
        gram_FF, kept_K = self.refit.statistic.gram_FF, self.refit.kept_K
        shared = float((change_BK * self.targets_DK[rows]).sum())
        return linalg.gram_energy_of(gram_FF, kept_K, change_BK) - 2 * shared

    def remainders(self, weight_DF: Tensor) -> Blocks:
        """|b|^2."""
        return self.refit.remainders(weight_DF)
