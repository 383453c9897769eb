"""Linear algebra on calibration statistics: the one module that chooses its dtypes.

Letters: T tokens, F width of the consumer's input, D hidden, K kept columns, P pruned columns.
Everything is fp64, except the fp32 products inside `add_gram_` (summed in fp64). Nothing falls back silently.
"""

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from specs.errors import ModelError

WIDE = torch.float64
_GRAM_BLOCK = 512


def add_gram_(gram_FF: Tensor, z_TF: Tensor) -> None:
    """Add z'z to the lower block triangle of `gram_FF` (fp64), in place.

    Products are fp32 (TF32 must be off), one micro-batch each, the sum over micro-batches is fp64.
    Cost: about T F^2 flops, half of a full product, since blocks above the diagonal are left alone (`mirror_` fills them).
    """
    z_TF = z_TF.float()
    width = z_TF.shape[1]
    for start in range(0, width, _GRAM_BLOCK):
        stop = min(start + _GRAM_BLOCK, width)
        gram_FF[start:, start:stop] += z_TF[:, start:].T @ z_TF[:, start:stop]


def mirror_(gram_FF: Tensor) -> Tensor:
    """Copy the lower triangle onto the upper one, in place."""
    gram_FF.copy_(torch.tril(gram_FF) + torch.tril(gram_FF, -1).T)
    return gram_FF


def stack_r(r_FF: Tensor | None, rows_TF: Tensor) -> Tensor:
    """One step of tall-skinny QR: the R factor of [R; rows], with a non-negative diagonal.

    As backward stable as Householder QR of all rows at once (Demmel et al., communication-avoiding QR).
    Cost: 2 (T + F) F^2 flops.
    """
    rows = rows_TF.to(WIDE) if r_FF is None else torch.cat([r_FF, rows_TF.to(WIDE)])
    r: Tensor = torch.linalg.qr(rows, mode="r").R
    return r * torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(WIDE)[:, None]


def pivot_gram(gram_FF: Tensor, scale_F: Tensor) -> Tensor:
    """Column order of pivoted Cholesky on diag(s) G diag(s): the pivots of column-pivoted QR of Z diag(s).

    Source: the Gram correspondence; LAPACK pstrf. Columns beyond the numerical rank follow in index order.
    Resolves residual column norms down to about 1e-8 of the largest; below that use `pivot_r`. Cost: F^3/3 flops.
    """
    scaled = gram_FF * scale_F[:, None] * scale_F
    _, pivots, rank, info = lapack.dpstrf(np.asfortranarray(scaled.cpu().numpy()), lower=1, overwrite_a=1)
    if info < 0:
        raise ValueError(f"pstrf: argument {-info} is illegal")
    order = torch.from_numpy(pivots.astype(np.int64) - 1)
    return torch.cat([order[:rank], order[rank:].sort().values])


def pivot_r(r_FF: Tensor, scale_F: Tensor) -> Tensor:
    """Column order of column-pivoted QR of R diag(s), which is that of Z diag(s). LAPACK geqp3, 4/3 F^3 flops, half of them BLAS-2."""
    factor, pivots, _, _, info = lapack.dgeqp3(np.asfortranarray((r_FF * scale_F).cpu().numpy()), overwrite_a=1)
    if info < 0:
        raise ValueError(f"geqp3: argument {-info} is illegal")
    diagonal = np.abs(np.diagonal(factor))
    rank = int(np.count_nonzero(diagonal > diagonal[:1] * len(pivots) * np.finfo(np.float64).eps))
    order = torch.from_numpy(pivots.astype(np.int64) - 1)
    return torch.cat([order[:rank], order[rank:].sort().values])


def pivot_blocks_gram(gram_FF: Tensor, scale_F: Tensor, block: int, count: int) -> Tensor:
    """Greedy block pivoting: the block of columns of Z diag(s) with the most energy left is taken whole, and projected out.

    The block form of column-pivoted QR: STAT's pivoting with a KV group as the unit (the paper's text has heads only).
    A block that is numerically dependent is projected out by its numerical rank. Cost: 2 F^2 per column taken.

    Returns:
        The first `count` block indices, in the order taken; ties go to the lower index.
    """
    residual = gram_FF * scale_F[:, None] * scale_F
    rounding = float(torch.diagonal(residual).max()) * len(residual) * torch.finfo(WIDE).eps
    taken: list[int] = []
    for _ in range(count):
        taken.append(_heaviest(torch.diagonal(residual), block, taken))
        columns = slice(taken[-1] * block, (taken[-1] + 1) * block)
        values, vectors = torch.linalg.eigh(residual[columns, columns])
        solid = values > rounding
        basis = residual[:, columns] @ (vectors[:, solid] / values[solid].sqrt())
        residual -= basis @ basis.T
    return torch.tensor(taken, dtype=torch.int64)


def pivot_blocks_r(r_FF: Tensor, scale_F: Tensor, block: int, count: int) -> Tensor:
    """`pivot_blocks_gram` on the R factor: the same greedy order without squaring the condition number."""
    residual = r_FF * scale_F
    rounding = float(torch.linalg.vector_norm(residual, dim=0).max()) * residual.shape[1] * torch.finfo(WIDE).eps
    taken: list[int] = []
    for _ in range(count):
        taken.append(_heaviest(residual.square().sum(0), block, taken))
        columns = slice(taken[-1] * block, (taken[-1] + 1) * block)
        basis, values, _ = torch.linalg.svd(residual[:, columns], full_matrices=False)
        basis = basis[:, values > rounding]
        residual -= basis @ (basis.T @ residual)
    return torch.tensor(taken, dtype=torch.int64)


def _heaviest(energy_F: Tensor, block: int, taken: list[int]) -> int:
    energies = energy_F.reshape(-1, block).sum(1)
    energies[taken] = -torch.inf
    return int(torch.argmax(energies))


def solve_gram(gram_KK: Tensor, cross_KD: Tensor, ridge: float) -> Tensor:
    """(G + ridge I)^-1 C by Cholesky.

    Raises:
        ModelError: the damped matrix is singular in fp64.
    """
    damped = gram_KK.clone()
    torch.diagonal(damped).add_(ridge)
    factor, info = torch.linalg.cholesky_ex(damped)
    rounding = float(torch.diagonal(damped).max()) * len(damped) * torch.finfo(WIDE).eps
    if int(info) or (ridge <= rounding and _is_singular(damped, torch.cholesky_inverse(factor))):
        raise ModelError(
            f"the Gram matrix of the {len(gram_KK)} kept columns is singular (ridge {ridge:g}): "
            "raise correction.damping, or take more calibration tokens"
        )
    return torch.cholesky_solve(cross_KD, factor)


def solve_r(r_FK: Tensor, target_FD: Tensor, ridge: float) -> Tensor:
    """argmin |R X - B|^2 + ridge |X|^2 by QR of [R; sqrt(ridge) I]: works on the square root of `solve_gram`'s condition number.

    Raises:
        ModelError: R has dependent columns and there is no ridge.
    """
    kept = r_FK.shape[1]
    rows = torch.cat([r_FK, torch.eye(kept, dtype=WIDE, device=r_FK.device) * ridge**0.5])
    q, r = torch.linalg.qr(rows)
    if _is_singular(r, torch.linalg.solve_triangular(r, torch.eye(kept, dtype=WIDE, device=r.device), upper=True)):
        raise ModelError("the kept columns are linearly dependent: raise correction.damping, or take more calibration tokens")
    solution: Tensor = torch.linalg.solve_triangular(r, q[: len(r_FK)].T @ target_FD, upper=True)
    return solution


def _is_singular(matrix_KK: Tensor, inverse_KK: Tensor) -> bool:
    """Whether the condition number (1-norm) leaves no digit in fp64. Pivots alone do not tell: rounding can leave all of them positive."""
    condition = float(torch.linalg.matrix_norm(matrix_KK, 1) * torch.linalg.matrix_norm(inverse_KK, 1))
    return not condition * len(matrix_KK) * torch.finfo(WIDE).eps < 1  # also where the inverse is not finite
