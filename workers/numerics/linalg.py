"""Linear algebra on calibration statistics: the one module that chooses its dtypes.

Letters: T tokens, F width of the consumer's input, D hidden, K kept columns, P pruned columns, B
block of output rows, N rows of a least-squares problem. Everything is fp64, except the products
inside `add_gram_` and `add_cross_` (fp32, or exact and summed in fp32; in all summed in fp64).
Nothing falls back silently. Large matrices are worked on in place or in blocks of rows, so that
they may lie in files.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from scipy.linalg import lapack
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.machine.blocks import BLOCK_ROWS, PRODUCT_TOKENS
from rayprune.workers.machine.scratch import Scratch

WIDE = torch.float64
OLDEST_GPU = (8, 0)
"""Compute capability (NVIDIA's Ampere, and what others call so) from which on kernels are used."""
Solver = Callable[[Tensor], Tensor]
"""Solutions for a block of right sides, which are the rows of its argument, as rows."""


@cache
def kernels() -> ModuleType | None:
    """Those for GPUs, where there are any (Triton comes with a torch that is made for CUDA) and the
    GPU is one that Triton compiles for.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_GPU:
        return None
    try:
        return import_module("rayprune.workers.numerics.kernels")
    except ImportError:
        return None


def row_slices(count: int, device: torch.device) -> Iterator[slice]:
    """`count` rows in blocks of `BLOCK_ROWS` at most, all alike but for the last."""
    most = BLOCK_ROWS[device.type]
    size = math.ceil(count / math.ceil(count / most)) if count else most
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def wide_blocks(matrix: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Copies of blocks of rows, fp64, on `device`; the whole matrix, of any type and maybe in a
    file, is never converted at once.
    """
    # moved first: torch converts what goes to a GPU on the CPU, and would send four times as many
    # bytes
    blocks = row_slices(len(matrix), device)
    return ((rows, matrix[rows].to(device).to(WIDE, copy=True)) for rows in blocks)


def column_norms(weight_DF: Tensor) -> Tensor:
    """|W[:, j]| in fp64, from blocks of rows."""
    energy_F = torch.zeros(weight_DF.shape[1], dtype=WIDE, device=weight_DF.device)
    for _, weight_BF in wide_blocks(weight_DF, weight_DF.device):
        energy_F += weight_BF.square().sum(0)
    return energy_F.sqrt()


def add_gram_(gram_FF: Tensor, z_TF: Tensor) -> None:
    """Add z'z to the lower block triangle of `gram_FF` (fp64), in place.

    Products are fp32 (TF32 must be off) over `PRODUCT_TOKENS` tokens, their sum is fp64. On a GPU
    16-bit activations are multiplied on tensor cores where there is a kernel for it
    (`kernels.add_gram_`). Elsewhere they are widened, since one sum of torch's own products over so
    many tokens is cut off, not rounded: on an H100 that left errors of 2e-3 of the mean diagonal in
    the norm of the matrix, where fp32 products leave 3e-5 and the kernel 2e-5, and a direction
    without any energy got -3e-4 of it (-2e-5, -6e-6). Cost: about T F^2 flops, half of a full
    product, since blocks above the diagonal are left alone (`mirror_` fills them).
    """
    if z_TF.is_cuda and z_TF.itemsize == 2 and (fast := kernels()):
        fast.add_gram_(gram_FF, z_TF)
        return
    for some_TF in z_TF.split(PRODUCT_TOKENS):
        some_TF = some_TF.float()
        for columns in row_slices(z_TF.shape[1], z_TF.device):
            gram_FF[columns.start :, columns] += some_TF[:, columns.start :].T @ some_TF[:, columns]


def add_cross_(cross_FD: Tensor, z_TF: Tensor, e_TD: Tensor) -> None:
    """Add z'e to `cross_FD` (fp64), in place; fp32 products, as in `add_gram_`. Cost: 2 T F D
    flops.
    """
    for some_TF, some_TD in zip(
        z_TF.split(PRODUCT_TOKENS), e_TD.split(PRODUCT_TOKENS), strict=True
    ):
        some_TF, some_TD = some_TF.float(), some_TD.float()
        for columns in row_slices(z_TF.shape[1], z_TF.device):
            cross_FD[columns] += some_TF[:, columns].T @ some_TD


def mirror_(gram_FF: Tensor) -> Tensor:
    """Copy the lower triangle onto the upper one, in place."""
    for rows in row_slices(len(gram_FF), gram_FF.device):
        corner = gram_FF[rows, rows]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        gram_FF[rows, rows.stop :] = gram_FF[rows.stop :, rows].T
    return gram_FF


def gather_(out: Tensor, matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """matrix[rows][:, columns] into `out`, block by block."""
    for block in row_slices(len(rows), out.device):
        torch.index_select(matrix[rows[block]], 1, columns, out=out[block])
    return out


def gram_energy(gram_FF: Tensor, rows_BF: Tensor) -> float:
    """|Z M'|^2 = tr(M G M') from the lower block triangle of G = Z'Z. Accurate to about 1e-16 |Z|^2
    |M|^2. Cost: B F^2 flops.
    """
    total = torch.zeros((), dtype=WIDE, device=rows_BF.device)
    for block in row_slices(len(gram_FF), rows_BF.device):
        own, below = rows_BF[:, block], rows_BF[:, block.stop :]
        total += (own @ gram_FF[block, block]).mul_(own).sum() + 2 * (
            below @ gram_FF[block.stop :, block]
        ).mul_(own).sum()
    return max(0.0, float(total))


def gram_energy_of(gram_FF: Tensor, columns_K: Tensor, rows_BK: Tensor) -> float:
    """`gram_energy` of rows that are zero but in some columns, which ascend. Cost: B K^2 flops."""
    total = torch.zeros((), dtype=WIDE, device=rows_BK.device)
    for block in row_slices(len(columns_K), rows_BK.device):
        below_K, own = columns_K[block.start :], rows_BK[:, block]
        out = torch.empty(len(below_K), own.shape[1], dtype=WIDE, device=rows_BK.device)
        some = gather_(out, gram_FF, below_K, columns_K[block])
        size = own.shape[1]
        total += (own @ some[:size]).mul_(own).sum() + 2 * (
            rows_BK[:, block.stop :] @ some[size:]
        ).mul_(own).sum()
    return max(0.0, float(total))


def r_factor(rows_NF: Tensor) -> Tensor:
    """The R factor of QR, with a non-negative diagonal. Householder QR, 2 N F^2 flops.

    Of [R; rows] it is a step of tall-skinny QR, as backward stable as QR of all rows at once
    (Demmel et al., communication-avoiding QR).
    """
    r: Tensor = torch.linalg.qr(rows_NF.to(WIDE), mode="r").R
    # as a file holds it: alike in all bits
    return r.mul_(torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(WIDE)[:, None]).contiguous()


def cholesky_solver(gram_KK: Tensor, ridge: float) -> Solver:
    """Solves X (G + ridge I) = B for blocks B of rows. The lower triangle of `gram_KK` becomes the
    factor, in place.

    Cost: K^3/3 flops, 2 K^2 for each right side.

    Raises:
        ModelError: the damped matrix is singular in fp64.
    """
    diagonal_K = torch.diagonal(gram_KK).add_(ridge)
    rounding = float(diagonal_K.max()) * len(gram_KK) * torch.finfo(WIDE).eps
    solve = _cholesky_on_gpu(gram_KK) if gram_KK.is_cuda else _cholesky_in_place(gram_KK)
    if solve is None or (ridge <= rounding and not rounding * _inverse_norm(solve, diagonal_K) < 1):
        raise ModelError(
            f"the Gram matrix of the {len(gram_KK)} kept columns is singular (ridge {ridge:g}): "
            "raise correction.damping, or take more calibration tokens"
        )
    return solve


def _cholesky_in_place(gram_KK: Tensor) -> Solver | None:
    """LAPACK potrf and potrs. The transposed view has Fortran's order: its upper triangle is the
    lower one, and nothing is copied.
    """
    factor, info = lapack.dpotrf(gram_KK.numpy().T, lower=0, overwrite_a=1, clean=0)

    def solve(target_BK: Tensor) -> Tensor:
        solution, _ = lapack.dpotrs(factor, target_BK.numpy().T, lower=0)
        return torch.from_numpy(solution.T)

    return None if info else solve


def _cholesky_on_gpu(gram_KK: Tensor) -> Solver | None:
    factor, info = torch.linalg.cholesky_ex(gram_KK)

    def solve(target_BK: Tensor) -> Tensor:
        solution: Tensor = torch.cholesky_solve(target_BK.T, factor)
        return solution.T

    return None if int(info) else solve


def inverse_(gram_FF: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix, both triangles, in its memory. Cost: F^3
    flops.

    Raises:
        ModelError: it is not positive definite in fp64.
    """
    if gram_FF.is_cuda:
        factor, info = torch.linalg.cholesky_ex(gram_FF)
        gram_FF.copy_(torch.cholesky_inverse(factor))
    else:
        factor, info = lapack.dpotrf(gram_FF.numpy().T, lower=0, overwrite_a=1, clean=0)
        _, info = (factor, info) if info else lapack.dpotri(factor, lower=0, overwrite_c=1)
    _check_regular(info, len(gram_FF))
    return mirror_(gram_FF)


def inverse_root(gram_FF: Tensor, ridge: float, scratch: Scratch) -> Callable[[slice], Tensor]:
    """Rows of the upper triangular R with R'R = (G + ridge I)^-1; what is left of the diagonal in
    them is of no meaning. R_jj^2 is the first number of the inverse of G + ridge I without the
    columns before j.

    With L L' = J (G + ridge I) J, where J turns the order around, R = J L^-1 J: no inverse is
    formed and factored again. Cost: 2 F^3/3 flops; F^2 8 bytes in `scratch`.

    Raises:
        ModelError: the damped matrix is singular in fp64.
    """
    turned_FF = scratch.empty(*gram_FF.shape, dtype=WIDE)
    size = len(gram_FF)
    for rows in row_slices(size, gram_FF.device):
        turned_FF[size - rows.stop : size - rows.start] = gram_FF[rows].flip((0, 1))
    torch.diagonal(turned_FF).add_(ridge)
    if turned_FF.is_cuda:
        factor, info = torch.linalg.cholesky_ex(turned_FF)
        eye_FF = torch.eye(size, dtype=WIDE, device=turned_FF.device)
        torch.linalg.solve_triangular(factor, eye_FF, upper=False, out=turned_FF)
    else:
        factor, info = lapack.dpotrf(turned_FF.numpy().T, lower=0, overwrite_a=1, clean=0)
        _, info = (factor, info) if info else lapack.dtrtri(factor, lower=0, overwrite_c=1)
    _check_regular(info, size)
    return lambda rows: turned_FF[size - rows.stop : size - rows.start].flip((0, 1))


def _check_regular(info: Tensor | int, columns: int) -> None:
    """Refuse a Gram matrix that a factorisation has found singular."""
    if int(info):
        raise ModelError(
            f"the Gram matrix of {columns} columns is singular: raise the method's damping, or take"
            " more calibration tokens"
        )


def least_squares_solver(rows_MM: Tensor, ridge: float) -> Solver:
    """Minimises |R x - b|^2 + ridge |x|^2 for every row b of a block, by QR of [R; sqrt(ridge) I].

    Works on the square root of `cholesky_solver`'s condition number. Cost: about 6 M^3 flops, 3 M^2
    for each right side.

    Raises:
        ModelError: R has dependent columns and there is no ridge.
    """
    size = len(rows_MM)
    q, r = torch.linalg.qr(
        torch.cat([rows_MM, torch.eye(size, dtype=WIDE, device=rows_MM.device) * ridge**0.5])
    )
    largest_M = torch.linalg.vector_norm(r, dim=0)

    def back(columns_MB: Tensor) -> Tensor:
        solution_MB: Tensor = torch.linalg.solve_triangular(r, columns_MB, upper=True)
        return solution_MB.T

    def normal(rows_BM: Tensor) -> Tensor:
        return back(torch.linalg.solve_triangular(r.T, rows_BM.T, upper=False))

    rounding = float(largest_M.max()) * size * torch.finfo(WIDE).eps if size else 0.0
    if not rounding * _inverse_norm(normal, largest_M) ** 0.5 < 1:
        raise ModelError(
            "the kept columns are linearly dependent: raise correction.damping, or take more"
            " calibration tokens"
        )
    top_MM = q[:size]
    return lambda target_BM: back((target_BM @ top_MM).T)


def _inverse_norm(solve: Solver, like_K: Tensor) -> float:
    """The 1-norm of the inverse of a symmetric matrix, estimated from below by a few solves (Hager
    and Higham; LAPACK's pocon).

    Not finite where a solve is not. Pivots alone do not tell: rounding can leave all of them
    positive. The ascent from the uniform vector never sees the difference of two equal columns;
    Higham's alternating vector does.
    """
    size = len(like_K)
    alternating_K = torch.linspace(1, 2, size, dtype=WIDE, device=like_K.device)
    alternating_K[1::2].neg_()
    start_K, estimate = (
        torch.full_like(like_K, 1 / max(1, size)),
        float(solve(alternating_K[None])[0].abs().sum()) * 2 / max(1, 3 * size),
    )
    for _ in range(5):
        image_K = solve(start_K[None])[0]
        slope_K = solve(torch.where(image_K < 0, -1.0, 1.0).to(WIDE)[None])[0]
        estimate = max(estimate, float(image_K.abs().sum()))
        if not slope_K.isfinite().all():
            return float("inf")
        start_K = torch.zeros_like(like_K).index_fill_(0, slope_K.abs().argmax(), 1.0)
    return estimate


def unit_rows(units: Tensor, rows_per_unit: int) -> Tensor:
    """Indices of the rows (or columns) that belong to these units."""
    return (
        units[:, None] * rows_per_unit + torch.arange(rows_per_unit, device=units.device)
    ).flatten()
