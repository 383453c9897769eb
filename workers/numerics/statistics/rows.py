"""The activations' rows or their R factor, and corrections from them by QR.

Letters: T tokens, F width, D hidden, N rows, K kept columns, P pruned columns, B block of output
rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics import linalg, pivoting
from rayprune.workers.numerics.codec import from_array
from rayprune.workers.numerics.damping import Blocks
from rayprune.workers.numerics.linalg import WIDE, Solver
from rayprune.workers.numerics.statistics.moments import Moments
from rayprune.workers.numerics.statistics.protocol import (
    Judge,
    Refit,
    State,
    Tensors,
    Travelling,
    complement,
)


@dataclass
class RowsStatistic(Travelling):
    """The rows of Z as they came, or, once there are more of them than columns, the R factor of Z
    in fp64.

    Exact either way: works on the condition number of Z itself, and costs little where tokens are
    few.
    """

    parts: list[Tensor]
    moments: Moments
    scratch: Scratch

    @classmethod
    def empty(cls, width: int, scratch: Scratch, drift_width: int = 0) -> Self:
        """The statistic of no tokens; drift is not kept (a plan refuses it where rows are)."""
        assert drift_width == 0, "rows keep no drift"
        return cls([], Moments.empty(width, scratch.device), scratch)

    @classmethod
    def from_tensors(cls, tensors: Tensors, scratch: Scratch) -> Self:
        """Rebuild what `tensors` gave, in the memory of these."""
        return cls([tensors["rows"]], Moments.from_tensors(tensors), scratch)

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self:
        """Rebuild what `state` wrote; rows are never written to, so on the CPU they stay in the
        arrays.
        """
        rows_NF = from_array(state["rows"], getattr(torch, str(state["dtype"])))
        return cls([rows_NF.to(scratch.device)], Moments.from_state(state, scratch.device), scratch)

    @property
    def width(self) -> int:
        """F."""
        return len(self.moments.sums_F)

    def update(self, z_TF: Tensor, drift_TD: Tensor | None = None) -> None:
        """Keep the micro-batch. Cost: nothing, or 2 (T + F) F^2 flops once there are more rows than
        columns.
        """
        self._append([self.scratch.store(z_TF.detach())])
        self.moments = self.moments.plus(z_TF)

    def merge(self, other: Self) -> Self:
        """Both sets of rows, the other's behind."""
        self._append(other.parts)
        self.moments = self.moments.merge(other.moments)
        return self

    def _append(self, parts: list[Tensor]) -> None:
        """Add rows; more rows than columns become their R factor, by one step of tall-skinny QR."""
        parts = [*self.parts, *parts]
        # an empty one says nothing, not of what type the others are either
        self.parts = [part for part in parts if len(part)] or parts[:1]
        if sum(map(len, self.parts)) > self.width:
            self.parts = [self.scratch.store(linalg.r_factor(self._stacked(WIDE)))]

    def _stacked(self, dtype: torch.dtype) -> Tensor:
        sizes = [len(part) for part in self.parts]
        stacked_NF = self.scratch.empty(sum(sizes), self.width, dtype=dtype)
        for below, part in zip(stacked_NF.split(sizes), self.parts, strict=True):
            below.copy_(part)
        return stacked_NF

    @property
    def _rows(self) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0]
        return (
            torch.cat(self.parts)
            if self.parts
            else torch.empty(0, self.width, dtype=WIDE, device=self.scratch.device)
        )

    def finished(self) -> Self:
        """The same rows as one matrix: what is summed block by block must not depend on how they
        came, by micro-batches or from workers.
        """
        if len(self.parts) > 1:
            self.parts = [self._stacked(self.parts[0].dtype)]
        return self

    def tensors(self) -> Tensors:
        """The rows and the moments."""
        return {"rows": self._rows} | self.moments.tensors()

    def state(self) -> State:
        """The rows, the name of their type, and the moments."""
        dtype = str(self._rows.dtype).removeprefix("torch.")
        return super().state() | {"dtype": np.array(dtype)}

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.moments.num_tokens

    @property
    def mean_energy(self) -> float:
        """Mean squared column norm."""
        return (
            sum(float(torch.linalg.vector_norm(part, dtype=WIDE)) ** 2 for part in self.parts)
            / self.width
        )

    @property
    def column_energy(self) -> Tensor:
        """Squared column norms."""
        norms = [torch.linalg.vector_norm(part, dim=0, dtype=WIDE) for part in self.parts]
        return (
            torch.stack([norm_F.square() for norm_F in norms]).sum(0)
            if norms
            else torch.zeros_like(self.moments.sums_F)
        )

    @property
    def column_variance(self) -> Tensor:
        """Squared column norms over the tokens, less the squared mean."""
        return self.moments.variance(self.column_energy)

    def gram(self) -> Tensor:
        """The product of the rows with themselves, in blocks of rows."""
        gram_FF = self.scratch.zeros(self.width, self.width, dtype=WIDE)
        for part in self.parts:
            for _, z_BF in linalg.wide_blocks(part, gram_FF.device):
                gram_FF.addmm_(z_BF.T, z_BF)
        return gram_FF

    def is_finite(self) -> bool:
        """Whether all rows are finite."""
        return all(bool(torch.isfinite(part).all()) for part in self.parts)

    def order(self, scale_F: Tensor, unit: int, count: int, shrinkage: float = 0.0) -> Tensor:
        """Column-pivoted QR of the rows; by blocks when a unit has more than one column. A shrunk
        Gram matrix is regular, so that nothing is lost by its product.
        """
        scale_F = scale_F.to(self.scratch.device)
        if shrinkage:
            return pivoting.pivot_units(self.gram(), scale_F, unit, count, self.scratch, shrinkage)
        if unit == 1:
            return pivoting.pivot_rows(self.parts, scale_F, count, self.scratch)
        return pivoting.pivot_blocks_rows(self._rows, scale_F, unit, count)

    def refit(self, kept_K: Tensor) -> Refit:
        """Least squares on the rows."""
        return _RowsRefit(self.parts, self.width, kept_K, self.scratch)

    def energy(self, rows_BF: Tensor) -> float:
        """|Z M'|^2. Cost: 2 B N F flops."""
        return sum(
            float((rows_BF @ z_BF.T).square().sum())
            for part in self.parts
            for _, z_BF in linalg.wide_blocks(part, rows_BF.device)
        )

    def of_outputs(self, rows: slice) -> Self:
        """Itself."""
        return self

    def judge(self, weight_DF: Tensor, kept_K: Tensor) -> Judge:
        """By the energy of the whole change: there is no drift."""
        return _RowsJudge(self, kept_K)


@dataclass(frozen=True)
class _RowsJudge:
    statistic: RowsStatistic
    kept_K: Tensor

    def misfit(self, rows: slice, weight_BF: Tensor, change_BK: Tensor) -> float:
        """Cost: 2 B N F flops."""
        return self.statistic.energy(weight_BF.neg().index_copy_(1, self.kept_K, change_BK))

    def remainders(self, weight_DF: Tensor) -> Blocks:
        """None."""
        return ()


class _RowsRefit:
    """Z_K = Q R for N >= K rows, Z_K = L Q' for fewer: either way a square problem of min(N, K),
    and no matrix of K x K for few rows.

    Cost: 4 max(N, K) min(N, K)^2 flops once, then those of `linalg.least_squares_solver`.
    """

    def __init__(
        self, parts: Sequence[Tensor], width: int, kept_K: Tensor, scratch: Scratch
    ) -> None:
        self._parts, self._width, self._kept_K, self._scratch = parts, width, kept_K, scratch
        self._is_short = sum(map(len, parts)) < len(kept_K)
        kept_NK = self._columns(kept_K)
        self._q, r = torch.linalg.qr(kept_NK.T if self._is_short else kept_NK)
        self._core = r.T if self._is_short else r

    def _columns(self, columns: Tensor) -> Tensor:
        out = self._scratch.empty(sum(map(len, self._parts)), len(columns), dtype=WIDE)
        below = out
        for part in self._parts:
            for rows, z_BF in linalg.wide_blocks(part, columns.device):
                torch.index_select(z_BF, 1, columns, out=below[rows])
            below = below[len(part) :]
        return out

    def targets(self, weight_DF: Tensor) -> Tensor:
        """W_P Z_P', in the coordinates of the square problem: D x min(N, K). Cost: 2 D N P flops,
        and 2 D N K for N >= K.
        """
        targets = self._scratch.empty(len(weight_DF), len(self._core), dtype=WIDE)
        for rows, target_BN in self._lost(weight_DF):
            targets[rows] = target_BN if self._is_short else target_BN @ self._q
        return targets

    def _lost(self, weight_DF: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """b = W_P Z_P' by blocks of outputs."""
        pruned_P = complement(self._kept_K, self._width)
        pruned_NP = self._columns(pruned_P)
        for rows, weight_BF in linalg.wide_blocks(weight_DF, pruned_P.device):
            yield rows, weight_BF[:, pruned_P] @ pruned_NP.T

    def solver(self, ridge: float) -> Solver:
        """QR of [R; sqrt(ridge) I], or of [L; sqrt(ridge) I]."""
        if not self._is_short:
            return linalg.least_squares_solver(self._core, ridge)
        if ridge == 0:
            raise ModelError(
                f"{len(self._kept_K)} kept columns, but only {sum(map(len, self._parts))} tokens:"
                " raise correction.damping, or take more calibration tokens"
            )
        solve = linalg.least_squares_solver(self._core, ridge)
        return lambda target_BN: solve(target_BN) @ self._q.T

    def misfit(self, change_BK: Tensor, target_BM: Tensor, ridge: float) -> float:
        """In the coordinates of the square problem. Cost: 2 B K M flops."""
        output_BM = (
            change_BK @ self._q @ self._core.T if self._is_short else change_BK @ self._core.T
        )
        return float((output_BM - target_BM).square().sum())

    def remainders(self, weight_DF: Tensor) -> Blocks:
        """|b - b Q Q'|^2: what lies outside the kept columns' span. Cost: that of the targets, and
        2 D N K; nothing where rows are few.
        """
        if self._is_short:
            return ()
        return tuple(
            float((target_BN - target_BN @ self._q @ self._q.T).square().sum())
            for _, target_BN in self._lost(weight_DF)
        )
