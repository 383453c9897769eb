"""Greedy choice of columns: column-pivoted QR of Z diag(s), from the Gram matrix or from rows of Z.

Letters: F width, N rows, B columns of a panel, M columns that remain. fp64. Columns beyond the
numerical rank follow by their energy |z_j s_j|^2, largest first; ties go to the lower index.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from rayprune.workers.machine.blocks import PANEL
from rayprune.workers.machine.device import repeated
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.linalg import WIDE, kernels, row_slices

_STALE = 8  # the residual is compacted once one in so many of its columns is taken


def pivot_units(
    gram_FF: Tensor, scale_F: Tensor, unit: int, count: int, scratch: Scratch, shrinkage: float
) -> Tensor:
    """The first `count` units, of `unit` columns each, of pivoted Cholesky on diag(s) G diag(s)
    with `shrinkage` of all correlations taken away.
    """
    scale_F = scale_F.to(gram_FF.device)
    if unit == 1:
        return pivot_gram(gram_FF, scale_F, count, scratch, shrinkage)
    return pivot_blocks_gram(gram_FF, scale_F, unit, count, shrinkage)


def pivot_gram(
    gram_FF: Tensor, scale_F: Tensor, count: int, scratch: Scratch, shrinkage: float = 0.0
) -> Tensor:
    """The first `count` columns of pivoted Cholesky on diag(s) G diag(s): the pivots of
    column-pivoted QR of Z diag(s). `shrinkage` is the part of all correlations that is taken away
    before.

    LAPACK pstrf on the CPU; on a GPU the same rule and rank tolerance by kernels, or, where there
    are none, in `cholesky_pivots_`.
    Resolves residual column norms down to about 1e-8 of the largest; below that use `pivot_rows`.
    Cost: F^3/3 flops; one copy of the matrix, in `scratch`.
    """
    residual = torch.mul(
        gram_FF, scale_F[:, None], out=scratch.empty(*gram_FF.shape, dtype=WIDE)
    ).mul_(scale_F)
    energy_F = torch.diagonal(residual).clone()
    _shrink_(residual, shrinkage)
    if not residual.is_cuda:
        taken = _lapack_pivots_(residual)
    elif fast := kernels():
        taken = kernel_pivots_(residual, count, fast)
    else:
        taken = cholesky_pivots_(residual, count)
    return by_energy(taken, energy_F, count)


def _shrink_(matrix_FF: Tensor, by: float) -> None:
    """Towards its diagonal, in place."""
    if by:
        energy_F = torch.diagonal(matrix_FF).clone()
        torch.diagonal(matrix_FF.mul_(1 - by)).copy_(energy_F)


def _lapack_pivots_(matrix_FF: Tensor) -> Tensor:
    """The pivots up to the numerical rank, in place: the transposed view of a symmetric matrix has
    Fortran's order without a copy.
    """
    _, pivots, rank, info = lapack.dpstrf(matrix_FF.numpy().T, lower=1, overwrite_a=1)
    if info < 0:
        raise ValueError(f"pstrf: argument {-info} is illegal")
    return torch.from_numpy(pivots[:rank].astype(np.int64) - 1)


@dataclass
class _Residual:
    """What is left of the Gram matrix (lower triangle, in the leading corner of its memory), with
    the taken columns still in it.

    Taken columns have an energy of minus infinity.
    """

    matrix_MM: Tensor
    energy_M: Tensor
    index_M: Tensor

    def column(self, at: Tensor, position_M: Tensor) -> Tensor:
        """The column at a position known to the device only; `position_M` counts from 0."""
        stride = self.matrix_MM.stride(0)
        places_M = torch.add(position_M.minimum(at), position_M.maximum(at), alpha=stride)
        return self.matrix_MM.as_strided((stride * len(position_M),), (1,)).index_select(
            0, places_M
        )

    def subtract_(self, panel_BM: Tensor) -> None:
        """Take the panel's outer product away, below the diagonal."""
        _subtract_(self.matrix_MM, panel_BM)

    def compacted(self) -> "_Residual":
        """Without the taken columns. In place: what stays keeps its order, so rows move up only."""
        rest_M = self.energy_M.isfinite().nonzero().flatten()
        for block in row_slices(len(rest_M), rest_M.device):
            self.matrix_MM[block, : block.stop] = self.matrix_MM[rest_M[block]].index_select(
                1, rest_M[: block.stop]
            )
        return _Residual(
            self.matrix_MM[: len(rest_M), : len(rest_M)],
            self.energy_M[rest_M],
            self.index_M[rest_M],
        )


def _subtract_(matrix_MM: Tensor, panel_BM: Tensor) -> None:
    for block in row_slices(len(matrix_MM), matrix_MM.device):
        matrix_MM[block.start :, block].addmm_(
            panel_BM[:, block.start :].T, panel_BM[:, block], alpha=-1
        )


def _floor(energy_F: Tensor) -> Tensor:
    """Energy that rounding leaves of a column that depends on others."""
    return energy_F.max() * len(energy_F) * torch.finfo(WIDE).eps


def kernel_pivots_(matrix_FF: Tensor, count: int, kernels: ModuleType) -> Tensor:
    """`cholesky_pivots_` with one launch for each pivot, and one for all of a panel once it is
    recorded: nothing waits for the device before the end. Taken columns stay in the matrix.
    """
    panels = kernels.Panels(matrix_FF, _floor(torch.diagonal(matrix_FF)), PANEL)

    def panel() -> None:
        panels.pick()
        _subtract_(matrix_FF, panels.panel_BF)

    found = [
        (panels.picked_B.clone(), panels.solid_B.clone())
        for _ in repeated(panel, -(-count // PANEL), matrix_FF.device)
    ]
    picked, solid = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    return picked[: int(solid.sum())].long()


def cholesky_pivots_(matrix_FF: Tensor, count: int) -> Tensor:
    """Pivots of pivoted Cholesky until `count` or the numerical rank. Destroys the lower triangle
    of its argument.

    Source: LAPACK pstrf, right-looking in panels. Made for GPUs: pivots stay on the device, the
    driver of the loop waits once for each panel. Ties go to the lower index. Cost: F^3/3 flops at
    most (a tenth more for taken columns that are still updated), and 2 B F for each pivot.
    """
    energy_F = torch.diagonal(matrix_FF).clone()
    floor = _floor(energy_F)
    residual = _Residual(matrix_FF, energy_F, torch.arange(len(matrix_FF), device=matrix_FF.device))
    taken: list[Tensor] = []
    num_taken = num_stale = 0
    while num_taken < count:
        size = min(PANEL, count - num_taken)
        panel_BM, picked_B, solid_B = _panel(residual, size, floor)
        num_solid = int(solid_B.sum())  # the one wait for the device
        taken.append(residual.index_M[picked_B[:num_solid]])
        num_taken, num_stale = num_taken + num_solid, num_stale + num_solid
        if num_solid < size or num_taken == count:
            break
        residual.subtract_(panel_BM)
        if num_stale * _STALE >= len(residual.index_M):
            residual, num_stale = residual.compacted(), 0
    return torch.cat(taken) if taken else residual.index_M[:0]


def _panel(residual: _Residual, size: int, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`size` pivots in a row: their factor columns (as rows), their positions, and whether each had
    energy above the floor.

    Takes their energy away from `residual`, but leaves its matrix as it is. Cost: 2 B^2 M flops.
    """
    panel_BM = residual.energy_M.new_empty(size, len(residual.energy_M))
    position_M, picked_B = (
        torch.arange(len(residual.index_M), device=floor.device),
        residual.index_M.new_empty(size),
    )
    solid_B = torch.empty(size, dtype=torch.bool, device=floor.device)
    for step in range(size):
        at = torch.argmax(residual.energy_M, dim=0, keepdim=True)
        energy = residual.energy_M[at]
        column_M = residual.column(at, position_M).addmv_(
            panel_BM[:step].T, panel_BM[:step].index_select(1, at).flatten(), alpha=-1
        )
        is_solid = energy > floor
        torch.mul(column_M, torch.where(is_solid, energy.rsqrt(), 0.0), out=panel_BM[step])
        residual.energy_M.addcmul_(panel_BM[step], panel_BM[step], value=-1)
        residual.energy_M.index_fill_(0, at, -torch.inf)
        picked_B[step], solid_B[step] = at[0], is_solid[0]
    return panel_BM, picked_B, solid_B


def pivot_rows(parts: Sequence[Tensor], scale_F: Tensor, count: int, scratch: Scratch) -> Tensor:
    """The first `count` columns of column-pivoted QR of Z diag(s), from rows of Z or from its R
    factor, in parts.

    LAPACK geqp3, about 4 N^2 F flops where N < F, half of them BLAS-2; one fp64 copy of the rows,
    in `scratch`.
    """
    scaled_FN = scratch.empty(len(scale_F), sum(map(len, parts)), dtype=WIDE)
    rest_FN = scaled_FN
    for part in parts:
        torch.mul(part.T, scale_F[:, None], out=rest_FN[:, : len(part)])
        rest_FN = rest_FN[:, len(part) :]
    energy_F = torch.linalg.vector_norm(scaled_FN, dim=1).square()
    if not scaled_FN.shape[1]:
        return by_energy(torch.empty(0, dtype=torch.int64, device=energy_F.device), energy_F, count)
    factor, pivots, _, _, info = lapack.dgeqp3(scaled_FN.cpu().numpy().T, overwrite_a=1)
    if info < 0:
        raise ValueError(f"geqp3: argument {-info} is illegal")
    diagonal = np.abs(np.diagonal(factor))
    rank = int(np.count_nonzero(diagonal > diagonal[:1] * len(pivots) * np.finfo(np.float64).eps))
    return by_energy(
        torch.from_numpy(pivots[:rank].astype(np.int64) - 1).to(energy_F.device), energy_F, count
    )


def by_energy(taken: Tensor, energy: Tensor, count: int) -> Tensor:
    """The first `count` of those taken, then of the others by their energy."""
    order = torch.argsort(energy, descending=True, stable=True)
    return torch.cat([taken, order[~torch.isin(order, taken)]])[:count]


def pivot_blocks_gram(
    gram_FF: Tensor, scale_F: Tensor, block: int, count: int, shrinkage: float = 0.0
) -> Tensor:
    """Greedy block pivoting: the block of columns of Z diag(s) with the most energy left is taken
    whole, and projected out.

    The block form of column-pivoted QR: STAT's pivoting with a KV group as the unit (the paper's
    text has heads only). A block that is numerically dependent is projected out by its numerical
    rank. Cost: 2 F^2 per column taken.

    Returns:
        The first `count` block indices, in the order taken; ties go to the lower index.
    """
    residual = gram_FF * scale_F[:, None] * scale_F
    _shrink_(residual, shrinkage)
    energy = _block_energy(torch.diagonal(residual), block)
    rounding = float(torch.diagonal(residual).max()) * len(residual) * torch.finfo(WIDE).eps
    taken: list[int] = []
    while len(taken) < count:
        heaviest = _heaviest(_block_energy(torch.diagonal(residual), block), taken)
        columns = slice(heaviest * block, (heaviest + 1) * block)
        values, vectors = torch.linalg.eigh(residual[columns, columns])
        solid = values > rounding
        if not solid.any():
            break
        basis = residual[:, columns] @ (vectors[:, solid] / values[solid].sqrt())
        residual.addmm_(basis, basis.T, alpha=-1)
        taken.append(heaviest)
    return by_energy(torch.tensor(taken, dtype=torch.int64, device=energy.device), energy, count)


def pivot_blocks_rows(rows_NF: Tensor, scale_F: Tensor, block: int, count: int) -> Tensor:
    """`pivot_blocks_gram` on rows of Z or on its R factor: the same greedy order without squaring
    the condition number.
    """
    residual = rows_NF * scale_F
    norms_F = torch.linalg.vector_norm(residual, dim=0)
    energy = _block_energy(norms_F.square(), block)
    rounding = float(norms_F.max()) * len(scale_F) * torch.finfo(WIDE).eps
    taken: list[int] = []
    while len(taken) < count:
        heaviest = _heaviest(_block_energy(residual.square().sum(0), block), taken)
        basis, values, _ = torch.linalg.svd(
            residual[:, heaviest * block : (heaviest + 1) * block], full_matrices=False
        )
        basis = basis[:, values > rounding]
        if not basis.shape[1]:
            break
        residual.addmm_(basis, basis.T @ residual, alpha=-1)
        taken.append(heaviest)
    return by_energy(torch.tensor(taken, dtype=torch.int64, device=energy.device), energy, count)


def _block_energy(energy_F: Tensor, block: int) -> Tensor:
    return energy_F.reshape(-1, block).sum(1)


def _heaviest(energies: Tensor, taken: list[int]) -> int:
    energies[taken] = -torch.inf
    return int(torch.argmax(energies))
