"""What is remembered of the calibration activations: a Gram matrix or an R factor. Both answer the same questions.

Letters: T tokens, F width, D hidden, K kept columns, P pruned columns.
A statistic is additive: `update` per micro-batch, `merge` up the fixed tree (`workers.shards`).
"""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from workers import linalg

State = dict[str, np.ndarray]
"""A statistic as it travels between workers: plain fp64 arrays."""


class Refit(Protocol):
    """The correction problem of one kept set: min over C of |Z_K (W_K + C) - Z W|^2 + ridge |C|^2."""

    def solve(self, ridge: float) -> Tensor:
        """The best change C_KD of the kept rows of W, shrunk towards no change by the ridge."""
        ...

    def error(self, change_KD: Tensor) -> float:
        """|Z_K (W_K + C) - Z W|^2."""
        ...


class Statistic(Protocol):
    """A sum over calibration tokens from which units are selected and corrections solved."""

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Self:
        """The statistic of no tokens."""
        ...

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> Self:
        """Rebuild what `state` wrote, in memory of its own."""
        ...

    def update(self, z_TF: Tensor) -> None:
        """Add one micro-batch of the consumer's input."""
        ...

    def merge(self, other: Self) -> Self:
        """The statistic of both token sets; neither operand may be used again."""
        ...

    def state(self) -> State:
        """The statistic as arrays."""
        ...

    @property
    def mean_energy(self) -> float:
        """Mean over the columns of |z_j|^2: the unit of the damping."""
        ...

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        ...

    def order(self, scale_F: Tensor, unit: int, count: int) -> Tensor:
        """The first `count` units (of `unit` columns each) of greedy pivoting on Z diag(scale)."""
        ...

    def refit(self, weight_DF: Tensor, kept_K: Tensor) -> Refit:
        """The correction problem for these kept columns."""
        ...

    def output_energy(self, weight_DF: Tensor) -> float:
        """|Z W|^2."""
        ...


@dataclass
class GramStatistic:
    """Gram matrix Z'Z: fp32 products, fp64 sum. The fast route; squares the condition number of Z."""

    gram_FF: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Self:
        """The statistic of no tokens."""
        return cls(torch.zeros(width, width, dtype=linalg.WIDE, device=device))

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> Self:
        """Rebuild what `state` wrote, in memory of its own."""
        return cls(torch.tensor(state["gram"], device=device))

    def update(self, z_TF: Tensor) -> None:
        """Add one micro-batch. Cost: T F^2 flops."""
        linalg.add_gram_(self.gram_FF, z_TF)

    def merge(self, other: Self) -> Self:
        """Add the other sum to this one."""
        self.gram_FF += other.gram_FF
        return self

    def state(self) -> State:
        """The lower triangle, the upper one filled in."""
        return {"gram": linalg.mirror_(self.gram_FF).cpu().numpy()}

    @property
    def mean_energy(self) -> float:
        """Mean diagonal."""
        return float(torch.diagonal(self.gram_FF).mean())

    def is_finite(self) -> bool:
        """A non-finite activation makes its diagonal entry non-finite."""
        return bool(torch.isfinite(torch.diagonal(self.gram_FF)).all())

    def order(self, scale_F: Tensor, unit: int, count: int) -> Tensor:
        """Pivoted Cholesky; by blocks when a unit has more than one column."""
        if unit == 1:
            return linalg.pivot_gram(self.gram_FF, scale_F)[:count]
        return linalg.pivot_blocks_gram(self.gram_FF, scale_F, unit, count)

    def refit(self, weight_DF: Tensor, kept_K: Tensor) -> Refit:
        """Normal equations."""
        return _GramRefit(self.gram_FF, weight_DF, kept_K)

    def output_energy(self, weight_DF: Tensor) -> float:
        """tr(W' G W)."""
        return float(((weight_DF @ self.gram_FF) * weight_DF).sum())


class _GramRefit:
    """error(C) = tr(C'G_KK C) - 2 tr(C'G_KP W_P) + tr(W_P'G_PP W_P), minimised by (G_KK + ridge I)^-1 G_KP W_P."""

    def __init__(self, gram_FF: Tensor, weight_DF: Tensor, kept_K: Tensor) -> None:
        pruned_P = complement(kept_K, len(gram_FF))
        removed_PD = weight_DF[:, pruned_P].T
        rows_KF = gram_FF[kept_K]
        self._gram_KK = rows_KF[:, kept_K].contiguous()
        self._cross_KD = rows_KF[:, pruned_P] @ removed_PD
        self._removed = float(((gram_FF[pruned_P][:, pruned_P] @ removed_PD) * removed_PD).sum())

    def solve(self, ridge: float) -> Tensor:
        """See `Refit`."""
        return linalg.solve_gram(self._gram_KK, self._cross_KD, ridge)

    def error(self, change_KD: Tensor) -> float:
        """See `Refit`. Accurate to about 1e-16 of the removed energy, since terms cancel."""
        return max(0.0, self._removed + float(((self._gram_KK @ change_KD - 2 * self._cross_KD) * change_KD).sum()))


@dataclass
class RStatistic:
    """R factor of Z by tall-skinny QR, all in fp64. The exact route: works on the condition number of Z itself."""

    r_FF: Tensor | None
    width: int

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Self:
        """The statistic of no tokens."""
        del device
        return cls(None, width)

    @classmethod
    def from_state(cls, state: State, device: torch.device) -> Self:
        """Rebuild what `state` wrote, in memory of its own."""
        r_FF = torch.tensor(state["r"], device=device)
        return cls(r_FF, r_FF.shape[1])

    def update(self, z_TF: Tensor) -> None:
        """Stack one micro-batch under R and factor again. Cost: 2 (T + F) F^2 flops."""
        self.r_FF = linalg.stack_r(self.r_FF, z_TF)

    def merge(self, other: Self) -> Self:
        """R of both R factors stacked."""
        if other.r_FF is not None:
            self.r_FF = linalg.stack_r(self.r_FF, other.r_FF)
        return self

    def _square(self) -> Tensor:
        """R padded with zero rows to F x F, so that fewer tokens than columns need no special case."""
        r_FF = torch.zeros(0, self.width, dtype=linalg.WIDE) if self.r_FF is None else self.r_FF
        return torch.cat([r_FF, r_FF.new_zeros(max(0, self.width - len(r_FF)), self.width)])

    def state(self) -> State:
        """The R factor."""
        return {"r": self._square().cpu().numpy()}

    @property
    def mean_energy(self) -> float:
        """Mean squared column norm."""
        return float(self._square().square().sum() / self.width)

    def is_finite(self) -> bool:
        """Whether R is finite."""
        return bool(torch.isfinite(self._square()).all())

    def order(self, scale_F: Tensor, unit: int, count: int) -> Tensor:
        """Column-pivoted QR of R; by blocks when a unit has more than one column."""
        if unit == 1:
            return linalg.pivot_r(self._square(), scale_F)[:count]
        return linalg.pivot_blocks_r(self._square(), scale_F, unit, count)

    def refit(self, weight_DF: Tensor, kept_K: Tensor) -> Refit:
        """Least squares on R."""
        return _RRefit(self._square(), weight_DF, kept_K)

    def output_energy(self, weight_DF: Tensor) -> float:
        """|R W|^2."""
        return float((self._square() @ weight_DF.T).square().sum())


class _RRefit:
    def __init__(self, r_FF: Tensor, weight_DF: Tensor, kept_K: Tensor) -> None:
        pruned_P = complement(kept_K, r_FF.shape[1])
        self._kept_FK = r_FF[:, kept_K]
        self._removed_FD = r_FF[:, pruned_P] @ weight_DF[:, pruned_P].T

    def solve(self, ridge: float) -> Tensor:
        """See `Refit`."""
        return linalg.solve_r(self._kept_FK, self._removed_FD, ridge)

    def error(self, change_KD: Tensor) -> float:
        """See `Refit`."""
        return float((self._kept_FK @ change_KD - self._removed_FD).square().sum())


STATISTICS: dict[str, type[Statistic]] = {"gram": GramStatistic, "qr": RStatistic}
"""The statistic behind each value of `method.factorization`."""


def complement(kept_K: Tensor, width: int) -> Tensor:
    """Indices 0 ... width-1 that are not kept, ascending."""
    mask = torch.ones(width, dtype=torch.bool, device=kept_K.device)
    mask[kept_K] = False
    return mask.nonzero().flatten()
