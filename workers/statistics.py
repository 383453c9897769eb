"""What is remembered of the calibration activations: a Gram matrix or rows. Both answer the same questions.

Letters: T tokens, F width, D hidden, K kept columns, P pruned columns, B block of output rows, N rows.
A statistic is additive: `update` per micro-batch, `merge` up the fixed tree (`workers.shards`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from specs.errors import ModelError
from workers import linalg, pivoting
from workers.codec import from_array, to_array
from workers.linalg import WIDE, Solver
from workers.scratch import Scratch

State = dict[str, np.ndarray]
"""A statistic as it travels between workers."""


class Refit(Protocol):
    """The correction problem of one kept set: min over C of |Z_K C - Z_P W_P'|^2 + ridge |C|^2, C the change of W_K.

    `targets` is computed once; `solver` factors once for each ridge; then it solves for block after block of targets.
    """

    def targets(self, weight_DF: Tensor) -> Tensor:
        """The right sides as rows, one for each output, fp64; `weight_DF` has any type and is read in blocks."""
        ...

    def solver(self, ridge: float) -> Solver:
        """From a block of targets to the best change C_BK of the kept columns, shrunk towards no change by the ridge.

        Raises:
            ModelError: the problem is singular.
        """
        ...


class Statistic(Protocol):
    """A sum over calibration tokens from which units are selected and corrections solved."""

    @property
    def scratch(self) -> Scratch:
        """Where its large matrices lie."""
        ...

    @classmethod
    def empty(cls, width: int, scratch: Scratch, drift_width: int = 0) -> Self:
        """The statistic of no tokens; with a `drift_width` (D) of tokens whose drift is known."""
        ...

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self:
        """Rebuild what `state` wrote; its arrays are only read."""
        ...

    def update(self, z_TF: Tensor, drift_TD: Tensor | None = None) -> None:
        """Add one micro-batch of the consumer's input. It may be kept, so it must not be written to later.

        `drift_TD` is what the consumer's output should have besides, given exactly if the statistic has a drift width.
        """
        ...

    def merge(self, other: Self) -> Self:
        """The statistic of both token sets; neither operand may be used again."""
        ...

    def finished(self) -> Self:
        """This statistic, ready for the questions below: to be called after the last update or merge."""
        ...

    def state(self) -> State:
        """The statistic as arrays."""
        ...

    @property
    def mean_energy(self) -> float:
        """Mean over the columns of |z_j|^2: the unit of the damping."""
        ...

    @property
    def column_energy(self) -> Tensor:
        """|z_j|^2 of every column, fp64."""
        ...

    @property
    def column_variance(self) -> Tensor:
        """Variance of every column over the tokens, fp64."""
        ...

    def gram(self) -> Tensor:
        """Z'Z, F x F, fp64, only to be read. Cost on rows: N F^2 flops, and the matrix in `Scratch`."""
        ...

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        ...

    def order(self, scale_F: Tensor, unit: int, count: int) -> Tensor:
        """The first `count` units (of `unit` columns each) of greedy pivoting on Z diag(scale)."""
        ...

    def refit(self, kept_K: Tensor) -> Refit:
        """The correction problem for these kept columns, which ascend."""
        ...

    def energy(self, rows_BF: Tensor) -> float:
        """|Z M'|^2 for a block M of rows, fp64: the squared output of a weight, or of a change of one."""
        ...

    def misfit(self, change_BF: Tensor, outputs: slice) -> float:
        """|Z M' - E|^2 for a change M of some outputs' weights and their drift E, fp64; without drift, the energy."""
        ...


@dataclass
class Drift:
    """What the outputs of a consumer lack: Z'E and the energies of the columns of E (T x D), fp64."""

    cross_FD: Tensor
    energy_D: Tensor

    @classmethod
    def empty(cls, width: int, outputs: int, scratch: Scratch) -> Self:
        """Of no tokens."""
        return cls(scratch.zeros(width, outputs, dtype=WIDE), torch.zeros(outputs, dtype=WIDE, device=scratch.device))

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self | None:
        """Rebuild what `state` wrote, in memory of its own; None where it wrote nothing."""
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

    def state(self) -> State:
        """As arrays."""
        return {"cross": to_array(self.cross_FD), "drift_energy": to_array(self.energy_D)}


@dataclass(frozen=True)
class Moments:
    """Sums of the columns of Z over so many tokens: what Z'Z does not tell. fp32 in a micro-batch, fp64 over them."""

    sums_F: Tensor
    num_tokens: int

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Self:
        """Of no tokens."""
        return cls(torch.zeros(width, dtype=WIDE, device=device), 0)

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> Self:
        """Rebuild what `state` wrote."""
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

    def state(self) -> State:
        """As arrays."""
        return {"sums": to_array(self.sums_F), "num_tokens": np.array(self.num_tokens)}


@dataclass
class GramStatistic:
    """Gram matrix Z'Z: fp32 products, fp64 sum. The fast route; squares the condition number of Z."""

    gram_FF: Tensor
    moments: Moments
    scratch: Scratch
    drift: Drift | None = None

    @classmethod
    def empty(cls, width: int, scratch: Scratch, drift_width: int = 0) -> Self:
        """The statistic of no tokens."""
        drift = Drift.empty(width, drift_width, scratch) if drift_width else None
        return cls(scratch.zeros(width, width, dtype=WIDE), Moments.empty(width, scratch.device), scratch, drift)

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self:
        """Rebuild what `state` wrote, in memory of its own, since sums are formed in place."""
        gram_FF = from_array(state["gram"], WIDE)
        copy_FF = scratch.empty(*gram_FF.shape, dtype=WIDE).copy_(gram_FF)
        return cls(copy_FF, Moments.from_state(state, scratch.device), scratch, Drift.from_state(state, scratch))

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

    def state(self) -> State:
        """The whole matrix, the moments, and the drift."""
        drift = self.drift.state() if self.drift else {}
        return {"gram": to_array(self.finished().gram_FF)} | self.moments.state() | drift

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

    def order(self, scale_F: Tensor, unit: int, count: int) -> Tensor:
        """Pivoted Cholesky; by blocks when a unit has more than one column."""
        scale_F = scale_F.to(self.gram_FF.device)
        if unit == 1:
            return pivoting.pivot_gram(self.gram_FF, scale_F, count, self.scratch)
        return pivoting.pivot_blocks_gram(self.gram_FF, scale_F, unit, count)

    def refit(self, kept_K: Tensor) -> Refit:
        """Normal equations."""
        return _GramRefit(self.gram_FF, kept_K, self.drift, self.scratch)

    def energy(self, rows_BF: Tensor) -> float:
        """tr(M G M'). Cost: B F^2 flops."""
        return linalg.gram_energy(self.gram_FF, rows_BF)

    def misfit(self, change_BF: Tensor, outputs: slice) -> float:
        """tr(M G M') - 2 tr(M Z'E) + |E|^2."""
        energy = self.energy(change_BF)
        if self.drift is None:
            return energy
        shared = float((change_BF * self.drift.cross_FD[:, outputs].T).sum())
        return max(0.0, energy - 2 * shared + float(self.drift.energy_D[outputs].sum()))


@dataclass(frozen=True)
class _GramRefit:
    """C (G_KK + ridge I) = W_P G_PK + E'Z_K."""

    gram_FF: Tensor
    kept_K: Tensor
    drift: Drift | None
    scratch: Scratch

    def targets(self, weight_DF: Tensor) -> Tensor:
        """W_P G_PK + E'Z_K, D x K. Cost: 2 D K P flops."""
        pruned_P = complement(self.kept_K, len(self.gram_FF))
        gram_PK = self._gathered(pruned_P)
        targets_DK = self.scratch.empty(len(weight_DF), len(self.kept_K), dtype=WIDE)
        for rows, weight_BF in linalg.wide_blocks(weight_DF, self.gram_FF.device):
            torch.mm(weight_BF[:, pruned_P], gram_PK, out=targets_DK[rows])
            if self.drift is not None:
                targets_DK[rows] += self.drift.cross_FD[:, rows].index_select(0, self.kept_K).T
        return targets_DK

    def solver(self, ridge: float) -> Solver:
        """Cholesky of a copy of G_KK."""
        return linalg.cholesky_solver(self._gathered(self.kept_K), ridge)

    def _gathered(self, rows: Tensor) -> Tensor:
        out = self.scratch.empty(len(rows), len(self.kept_K), dtype=WIDE)
        return linalg.gather_(out, self.gram_FF, rows, self.kept_K)


@dataclass
class RowsStatistic:
    """The rows of Z as they came, or, once there are more of them than columns, the R factor of Z in fp64.

    Exact either way: works on the condition number of Z itself, and costs little where tokens are few.
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
    def from_state(cls, state: State, scratch: Scratch) -> Self:
        """Rebuild what `state` wrote; rows are never written to, so on the CPU they stay in the arrays."""
        rows_NF = from_array(state["rows"], getattr(torch, str(state["dtype"])))
        return cls([rows_NF.to(scratch.device)], Moments.from_state(state, scratch.device), scratch)

    @property
    def width(self) -> int:
        """F."""
        return len(self.moments.sums_F)

    def update(self, z_TF: Tensor, drift_TD: Tensor | None = None) -> None:
        """Keep the micro-batch. Cost: nothing, or 2 (T + F) F^2 flops once there are more rows than columns."""
        self._append([self.scratch.store(z_TF.detach())])
        self.moments = self.moments.plus(z_TF)

    def merge(self, other: Self) -> Self:
        """Both sets of rows, the other's behind."""
        self._append(other.parts)
        self.moments = self.moments.merge(other.moments)
        return self

    def _append(self, parts: list[Tensor]) -> None:
        """Add rows; more rows than columns become their R factor, by one step of tall-skinny QR."""
        self.parts = [*self.parts, *parts]
        if sum(map(len, self.parts)) > self.width:
            wide = [part.to(WIDE) for part in self.parts]
            self.parts = [linalg.r_factor(torch.cat(wide))]

    @property
    def _rows(self) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0]
        return torch.cat(self.parts) if self.parts else torch.empty(0, self.width, dtype=WIDE, device=self.scratch.device)

    def finished(self) -> Self:
        """As it is."""
        return self

    def state(self) -> State:
        """The rows, the name of their type, and the moments."""
        rows_NF = self._rows
        return {"rows": to_array(rows_NF), "dtype": np.array(str(rows_NF.dtype).removeprefix("torch."))} | self.moments.state()

    @property
    def mean_energy(self) -> float:
        """Mean squared column norm."""
        return sum(float(torch.linalg.vector_norm(part, dtype=WIDE)) ** 2 for part in self.parts) / self.width

    @property
    def column_energy(self) -> Tensor:
        """Squared column norms."""
        norms = [torch.linalg.vector_norm(part, dim=0, dtype=WIDE) for part in self.parts]
        return torch.stack([norm_F.square() for norm_F in norms]).sum(0) if norms else torch.zeros_like(self.moments.sums_F)

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

    def order(self, scale_F: Tensor, unit: int, count: int) -> Tensor:
        """Column-pivoted QR of the rows; by blocks when a unit has more than one column."""
        scale_F = scale_F.to(self.scratch.device)
        if unit == 1:
            return pivoting.pivot_rows(self.parts, scale_F, count, self.scratch)
        return pivoting.pivot_blocks_rows(self._rows, scale_F, unit, count)

    def refit(self, kept_K: Tensor) -> Refit:
        """Least squares on the rows."""
        return _RowsRefit(self.parts, self.width, kept_K, self.scratch)

    def energy(self, rows_BF: Tensor) -> float:
        """|Z M'|^2. Cost: 2 B N F flops."""
        return sum(float((rows_BF @ z_BF.T).square().sum()) for part in self.parts for _, z_BF in linalg.wide_blocks(part, rows_BF.device))

    def misfit(self, change_BF: Tensor, outputs: slice) -> float:
        """The energy: there is no drift."""
        return self.energy(change_BF)


class _RowsRefit:
    """Z_K = Q R for N >= K rows, Z_K = L Q' for fewer: either way a square problem of min(N, K), and no matrix of K x K for few rows.

    Cost: 4 max(N, K) min(N, K)^2 flops once, then those of `linalg.least_squares_solver`.
    """

    def __init__(self, parts: Sequence[Tensor], width: int, kept_K: Tensor, scratch: Scratch) -> None:
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
        """W_P Z_P', in the coordinates of the square problem: D x min(N, K). Cost: 2 D N P flops, and 2 D N K for N >= K."""
        pruned_P = complement(self._kept_K, self._width)
        pruned_NP = self._columns(pruned_P)
        targets = self._scratch.empty(len(weight_DF), len(self._core), dtype=WIDE)
        for rows, weight_BF in linalg.wide_blocks(weight_DF, pruned_P.device):
            target_BN = weight_BF[:, pruned_P] @ pruned_NP.T
            targets[rows] = target_BN if self._is_short else target_BN @ self._q
        return targets

    def solver(self, ridge: float) -> Solver:
        """QR of [R; sqrt(ridge) I], or of [L; sqrt(ridge) I]."""
        if not self._is_short:
            return linalg.least_squares_solver(self._core, ridge)
        if ridge == 0:
            raise ModelError(
                f"{len(self._kept_K)} kept columns, but only {sum(map(len, self._parts))} tokens: raise correction.damping, "
                "or take more calibration tokens"
            )
        solve = linalg.least_squares_solver(self._core, ridge)
        return lambda target_BN: solve(target_BN) @ self._q.T


def statistic_type(needs_rows: bool, num_tokens: int, width: int) -> type[Statistic]:
    """The Gram matrix, unless rows are asked for or the activations themselves are smaller."""
    return RowsStatistic if needs_rows or num_tokens < width else GramStatistic


def restored(state: State, scratch: Scratch) -> Statistic:
    """The statistic that wrote a state."""
    kind: type[Statistic] = GramStatistic if "gram" in state else RowsStatistic
    return kind.from_state(state, scratch)


def complement(kept_K: Tensor, width: int) -> Tensor:
    """Indices 0 ... width-1 that are not kept, ascending."""
    mask = torch.ones(width, dtype=torch.bool, device=kept_K.device)
    mask[kept_K] = False
    return mask.nonzero().flatten()
