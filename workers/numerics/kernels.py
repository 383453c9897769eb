"""Kernels for GPUs, in Triton, which torch brings where it is made for CUDA: importing this module
fails elsewhere.

What they compute is told, and done without them, by `linalg.add_gram_` and
`pivoting.cholesky_pivots_`. Letters: T tokens, F width.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
"""Columns of a tile of the Gram matrix."""
CHUNK_TOKENS = 64
"""Tokens that tensor cores sum by themselves."""
PIVOT_COLUMNS = 64
"""Columns that one program of a pivot works on."""
ROUNDING = {"enable_fp_fusion": True}
"""Products and sums in one rounding, whatever is the default of Triton's version."""


@triton.jit
def _gram(z, gram, tile_rows, tile_columns, tokens, width, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """One tile of the lower triangle. Tensor cores cut off what does not fit their sum, so it is a
    fresh one for every chunk; chunks are added in fp32 with Kahan's correction, and the whole to
    the matrix in fp64. (Added without the correction they become one sum again: the compiler hands
    it to the tensor cores.)
    """
    tile = tl.program_id(0)
    rows = tl.load(tile_rows + tile) * TILE + tl.arange(0, TILE)
    columns = tl.load(tile_columns + tile) * TILE + tl.arange(0, TILE)
    some = tl.arange(0, CHUNK)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    rest = tl.zeros((TILE, TILE), dtype=tl.float32)
    left_at = z + some[:, None] * width + rows[None, :]
    right_at = z + some[:, None] * width + columns[None, :]
    for start in range(0, tokens, CHUNK):
        there = some[:, None] < tokens - start
        left = tl.load(left_at, mask=(rows[None, :] < width) & there, other=0.0)
        right = tl.load(right_at, mask=(columns[None, :] < width) & there, other=0.0)
        part = tl.dot(tl.trans(left), right) - rest
        together = total + part
        rest = (together - total) - part
        total = together
        left_at += CHUNK * width
        right_at += CHUNK * width
    at = gram + rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows[:, None] < width) & (columns[None, :] < width)
    found = total.to(tl.float64) - rest.to(tl.float64)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + found, mask=inside)


@triton.jit(do_not_specialize=["step"])  # one kernel for all
def _pivot(
    matrix,
    panel,
    energy,
    best_before,
    at_before,
    best_behind,
    at_behind,
    picked,
    solid,
    floor,
    step,
    width,
    blocks,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One pivot in one launch. Every program finds the column of the largest energy anew, from one
    number for each block; then it makes its own columns of the factor's next row, takes their
    energies away, and leaves the number of its block.
    """
    program = tl.program_id(0)
    each = tl.arange(0, BLOCKS)
    bests = tl.load(best_before + each, mask=each < blocks, other=-float("inf"))
    places = tl.load(at_before + each, mask=each < blocks, other=2147483647)
    best = tl.max(bests, 0)
    at = tl.min(tl.where(bests == best, places, 2147483647), 0)
    own = program * COLUMNS + tl.arange(0, COLUMNS)
    inside = own < width
    row = tl.maximum(own, at).to(tl.int64)
    column = tl.load(matrix + row * width + tl.minimum(own, at), mask=inside, other=0.0)
    some = tl.arange(0, ROWS)
    for start in range(0, step, ROWS):
        there = start + some < step
        rows = (start + some)[:, None] * width
        mine = tl.load(
            panel + rows + own[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        its = tl.load(panel + (start + some) * width + at, mask=there, other=0.0)
        column -= tl.sum(mine * its[:, None], 0)
    is_solid = best > tl.load(floor)
    value = tl.where(is_solid, column / tl.sqrt(tl.where(is_solid, best, 1.0)), 0.0)
    tl.store(panel + step * width + own, value, mask=inside)
    left = tl.load(energy + own, mask=inside, other=-float("inf"))
    left = tl.where(own == at, -float("inf"), left - value * value)
    tl.store(energy + own, left, mask=inside)
    left = tl.where(inside, left, -float("inf"))
    most = tl.max(left, 0)
    tl.store(best_behind + program, most)
    tl.store(at_behind + program, tl.min(tl.where(left == most, own, 2147483647), 0))
    if program == 0:
        tl.store(picked + step, at)
        tl.store(solid + step, is_solid.to(tl.int32))


@cache
def _tiles(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every tile of the lower triangle."""
    rows, columns = torch.tril_indices(*[-(-width // TILE)] * 2, device=device).int()
    return rows.contiguous(), columns.contiguous()


def add_gram_(gram_FF: Tensor, z_TF: Tensor) -> None:
    """Add z'z of 16-bit activations to the lower triangle (and some of the upper) of `gram_FF`
    (fp64). Products are exact, the sum of a chunk loses at most 2^-23 of its largest terms, the sum
    of the chunks about 2^-24 in all. Cost: T F^2 flops.
    """
    z_TF = z_TF.contiguous()
    tiles = _tiles(z_TF.shape[1], z_TF.device)
    sizes = {"TILE": TILE, "CHUNK": CHUNK_TOKENS, "num_warps": 8, "num_stages": 4}
    _gram[(len(tiles[0]),)](z_TF, gram_FF, *tiles, *z_TF.shape, **sizes, **ROUNDING)


def prepare(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what statistics and pivots of so many columns need."""
    gram_FF = torch.zeros(width, width, dtype=torch.float64, device=device)
    add_gram_(gram_FF, torch.zeros(CHUNK_TOKENS, width, dtype=dtype, device=device))
    Panels(gram_FF, gram_FF.new_zeros(()), 2).pick()


class Panels:
    """Pivots of a matrix whose lower triangle is used up, panel by panel."""

    def __init__(self, matrix_FF: Tensor, floor: Tensor, size: int) -> None:
        """Columns whose energy is not above `floor` (one number) are none; `size` pivots make a
        panel.
        """
        width, device = len(matrix_FF), matrix_FF.device
        self._matrix_FF, self._floor, self._size = matrix_FF, floor, size
        self._energy_F = torch.diagonal(matrix_FF).clone()
        self.panel_BF = matrix_FF.new_zeros(size, width)
        self._blocks = -(-width // PIVOT_COLUMNS)
        blocks = self._blocks + -self._blocks % 16  # every row begins where 16 bytes do
        padded = self._energy_F.new_full((blocks * PIVOT_COLUMNS,), -torch.inf)
        padded[:width] = self._energy_F
        best, at = padded.view(blocks, PIVOT_COLUMNS).max(1)
        starts = torch.arange(0, blocks * PIVOT_COLUMNS, PIVOT_COLUMNS, device=device)
        self._best, self._at = torch.stack([best, best]), torch.stack([at + starts] * 2).int()
        self.picked_B, self.solid_B = torch.empty(2, size, dtype=torch.int32, device=device)

    def pick(self) -> None:
        """Pick the next panel's pivots: `picked_B`, with energy above the floor where `solid_B`,
        and their rows of the factor, `panel_BF`, which are yet to be taken away from the matrix.
        """
        width, blocks = len(self._energy_F), self._blocks
        sizes = {
            "BLOCKS": triton.next_power_of_2(self._best.shape[1]),
            "COLUMNS": PIVOT_COLUMNS,
            "ROWS": 16,
            "num_warps": 4,
        }
        for number in range(self._size):
            before, behind = number % 2, (number + 1) % 2
            _pivot[(blocks,)](
                self._matrix_FF,
                self.panel_BF,
                self._energy_F,
                self._best[before],
                self._at[before],
                self._best[behind],
                self._at[behind],
                self.picked_B,
                self.solid_B,
                self._floor,
                number,
                width,
                blocks,
                **sizes,
                **ROUNDING,
            )
