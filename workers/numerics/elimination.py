"""Greedy elimination of units with exact refit, on one matrix that the sweep operator keeps up to
date.

Letters: F width, D hidden, U units, B columns of a unit, K kept columns, P pruned columns, R
columns of a pivot block. With S = Z'Z + ridge I, what is minimised over the kept set K is |Z_K W_K'
- Z W'|^2 + ridge |W_K' - W_K|^2: the correction of `rayprune.workers.numerics.correction`.
Everything is fp64.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.linalg import WIDE, inverse_, row_slices, unit_rows, wide_blocks


def _energies(blocks_UBB: Tensor, weight_UBD: Tensor) -> Tensor:
    """|tr(W' A^-1 W)| of every unit."""
    energy_U: Tensor = (torch.linalg.solve(blocks_UBB, weight_UBD) * weight_UBD).sum((1, 2)).abs()
    return energy_U


@dataclass
class Elimination:
    """A kept set, its refit, and what every unit's removal or return would change.

    `matrix_FF` holds -(S_KK)^-1, S_KK^-1 S_KP and S_PP - S_PK S_KK^-1 S_KP; `weight_FD` the
    refitted weight in rows K and the correlations of the removed columns with what the refit leaves
    in rows P. Changing sides is the sweep operator (Beaton 1964; Goodnight 1979), symmetric in this
    choice of signs.
    """

    matrix_FF: Tensor
    weight_FD: Tensor
    kept_U: Tensor

    @classmethod
    def of(
        cls, gram_FF: Tensor, weight_DF: Tensor, unit_columns: int, ridge: float, scratch: Scratch
    ) -> Self:
        """All units kept. Cost: F^3 flops; a copy of both operands, in `scratch`.

        Raises:
            ModelError: the damped matrix is singular.
        """
        matrix_FF = scratch.empty(*gram_FF.shape, dtype=WIDE).copy_(gram_FF)
        torch.diagonal(matrix_FF).add_(ridge)
        weight_FD = scratch.empty(weight_DF.shape[1], len(weight_DF), dtype=WIDE)
        for rows, weight_BF in wide_blocks(weight_DF, gram_FF.device):
            weight_FD[:, rows] = weight_BF.T
        kept_U = torch.ones(len(gram_FF) // unit_columns, dtype=torch.bool, device=gram_FF.device)
        return cls(inverse_(matrix_FF).neg_(), weight_FD, kept_U)

    @property
    def unit_columns(self) -> int:
        """Columns of one unit."""
        return len(self.matrix_FF) // len(self.kept_U)

    def changes(self) -> Tensor:
        """For every unit tr(W_B' |A_BB|^-1 W_B): how much the objective grows if a kept unit goes,
        or falls if a removed one returns.

        Source: OBS for groups (ZipLM, arXiv 2302.04089, eq. 3; OSSCAR, arXiv 2403.12983). Cost: F B
        (B + D) flops.
        """
        units, columns = len(self.kept_U), self.unit_columns
        weight_UBD = self.weight_FD.unflatten(0, (units, columns))
        blocks_BBU = torch.diagonal(
            self.matrix_FF.view(units, columns, units, columns), dim1=0, dim2=2
        )
        return torch.cat(
            [
                _energies(blocks_BBU[..., some].permute(2, 0, 1), weight_UBD[some])
                for some in row_slices(units, self.matrix_FF.device)
            ]
        )

    def flip_(self, units: Tensor) -> None:
        """Remove these units, or bring them back; all of them are on the same side. Cost: 2 R F (F
        + D) flops.
        """
        columns_R = unit_rows(units, self.unit_columns)
        sign = -1.0 if bool(self.kept_U[units[0]]) else 1.0
        pivot_RR, weight_RD = self.matrix_FF[columns_R][:, columns_R], self.weight_FD[columns_R]
        across_FR = self.matrix_FF[:, columns_R]
        solved_RF, solved_RD = (
            torch.linalg.solve(pivot_RR, across_FR.T),
            torch.linalg.solve(pivot_RR, weight_RD),
        )
        for rows in row_slices(len(self.matrix_FF), self.matrix_FF.device):
            self.matrix_FF[rows].addmm_(across_FR[rows], solved_RF, alpha=-1)
            self.weight_FD[rows].addmm_(across_FR[rows], solved_RD, alpha=-1)
        self.matrix_FF[columns_R] = sign * solved_RF
        self.matrix_FF[:, columns_R] = sign * solved_RF.T
        self.matrix_FF[columns_R[:, None], columns_R] = -torch.linalg.inv(pivot_RR)
        self.weight_FD[columns_R] = sign * solved_RD
        self.kept_U[units] = ~self.kept_U[units]

    def removal_order(self, count: int, rounds: int) -> list[int]:
        """Remove units until `count` stay, the cheapest first, in so many rounds of equal size; the
        units in the order they went.
        """
        removed: list[int] = []
        total = len(self.kept_U) - count
        for turn in range(1, rounds + 1):
            size = total * turn // rounds - len(removed)
            if size:
                cheapest = torch.argsort(
                    self.changes().masked_fill(~self.kept_U, torch.inf), stable=True
                )[:size]
                self.flip_(cheapest)
                removed += cheapest.tolist()
        return removed

    def swap_(self, most: int) -> int:
        """Exchange a removed unit for a kept one as long as that helps, at most so often; how often
        it was done.

        The removed unit that helps most comes back, then the cheapest kept one goes (the local
        search of OSSCAR, with the best exchange at each step). Cost: 4 F (F + D) B flops for each.
        """
        for done in range(most):
            back = torch.argmax(
                self.changes().masked_fill(self.kept_U, -torch.inf), dim=0, keepdim=True
            )
            self.flip_(back)
            out = torch.argmin(
                self.changes().masked_fill(~self.kept_U, torch.inf), dim=0, keepdim=True
            )
            self.flip_(out)
            if int(out) == int(back):
                return done
        return most
