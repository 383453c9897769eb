"""Zeros inside the matrices that read one input: which weights go, and what the others become.

Letters: D outputs, F inputs, R rows and C columns of scores, B a block of inputs. Everything is
fp64, in blocks of rows where it can be.

With `obs` it is SparseGPT's solution (arXiv 2301.00774): inputs are gone through in order; what a
weight that goes leaves is made up for by the weights behind it, those before it are frozen. In its
terms, with H = Z'Z + ridge I and R'R = H^-1, R upper triangular: input j costs w_j^2 / R_jj^2, and
w_k -= w_j R_jk / R_jj for every k > j. So at every input the weights behind are the least-squares
solution for all that was done before. All outputs of a matrix go together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayprune.specs.methods.options import Masks
from rayprune.workers.numerics.linalg import WIDE, inverse_root, wide_blocks
from rayprune.workers.numerics.statistics import Statistic

BLOCK_INPUTS = 128
"""Inputs whose errors go on to those behind together; without groups, zeros are counted in so
many. As in SparseGPT; a multiple of every group.
"""


@dataclass(frozen=True)
class Sparsified:
    """The matrices of a site with their zeros, and how well they reproduce its output.

    The errors are |Z (W' - W)| / |Z W| over all matrices, for a fit on the training shards alone:
    on those, on the held-out shards, and on these if the same weights went and no other changed.
    The weights themselves are fitted on all shards.
    """

    weights: tuple[Tensor, ...]
    training_error: float
    held_out_error: float
    mask_error: float


def sparsify(
    training: Statistic,
    held_out: Statistic,
    weights: Sequence[Tensor],
    masks: Masks,
    dtypes: Sequence[torch.dtype],
) -> Sparsified:
    """Make zeros in matrices (D, F) that read the same input, of any type; both statistics are
    consumed.

    The results have these types and lie beside their matrices. Cost, with `obs` twice: 2 F^3/3, and
    D F^2 for all outputs together; besides, 4 D F^2 for the errors.

    Raises:
        ModelError: the damped Gram matrix is singular.
    """
    errors = _Errors()
    fit = _Fit.of(training, masks)
    for weight_DF in weights:
        errors.add(training, held_out, weight_DF, fit.of_matrix(weight_DF))
    del fit  # its memory
    whole = _Fit.of(training.merge(held_out), masks)
    results = [
        whole.of_matrix(weight_DF).weight(weight_DF, dtype)
        for weight_DF, dtype in zip(weights, dtypes, strict=True)
    ]
    return Sparsified(tuple(results), *errors.relative)


@dataclass(frozen=True)
class _Sparse:
    """A matrix: which weights go, and all of them afterwards (None: the others stay as they
    are).
    """

    gone_DF: Tensor
    fitted_DF: Tensor | None

    def rows(self, rows: slice, weight_BF: Tensor) -> Tensor:
        """Some rows of it afterwards."""
        if self.fitted_DF is not None:
            return self.fitted_DF[rows]
        return weight_BF.masked_fill(self.gone_DF[rows], 0.0)

    def weight(self, weight_DF: Tensor, dtype: torch.dtype) -> Tensor:
        """All of it, rounded to a type, beside the matrix."""
        result_DF = torch.empty(weight_DF.shape, dtype=dtype, device=weight_DF.device)
        for rows, weight_BF in wide_blocks(weight_DF, self.gone_DF.device):
            result_DF[rows] = self.rows(rows, weight_BF).to(weight_DF.device, dtype)
        return result_DF


@dataclass
class _Errors:
    """Squared errors so far, and the squared output."""

    training: float = 0.0
    held_out: float = 0.0
    mask: float = 0.0
    training_output: float = 0.0
    held_out_output: float = 0.0

    def add(
        self, training: Statistic, held_out: Statistic, weight_DF: Tensor, made: _Sparse
    ) -> None:
        for rows, weight_BF in wide_blocks(weight_DF, made.gone_DF.device):
            self.training_output += training.energy(weight_BF)
            self.held_out_output += held_out.energy(weight_BF)
            change_BF = weight_BF - made.rows(rows, weight_BF)
            self.training += training.energy(change_BF)
            error = held_out.energy(change_BF)
            self.held_out += error
            if made.fitted_DF is not None:
                error = held_out.energy(weight_BF.mul_(made.gone_DF[rows]))
            self.mask += error

    @property
    def relative(self) -> tuple[float, float, float]:
        """On the training shards, on the others, and there of the mask alone."""
        return (
            _relative(self.training, self.training_output),
            _relative(self.held_out, self.held_out_output),
            _relative(self.mask, self.held_out_output),
        )


def _relative(error: float, energy: float) -> float:
    return (error / energy) ** 0.5 if energy > 0 else 0.0


@dataclass(frozen=True)
class _Fit:
    """What matrices that read one input are made sparse by."""

    masks: Masks
    statistic: Statistic
    root: Callable[[slice], Tensor] | None
    """Rows of R; None where nothing is corrected."""

    @classmethod
    def of(cls, statistic: Statistic, masks: Masks) -> "_Fit":
        if masks.score != "obs":
            return cls(masks, statistic, None)
        # without any energy every ridge gives no change, but none would be singular
        ridge = masks.damping * (statistic.mean_energy or 1.0)
        return cls(masks, statistic, inverse_root(statistic.gram(), ridge, statistic.scratch))

    def of_matrix(self, weight_DF: Tensor) -> _Sparse:
        device = self.statistic.scratch.device
        if self.root is None:
            return _Sparse(smallest_gone(weight_DF, self._importance(), self.masks), None)
        scratch = self.statistic.scratch
        weight_FD = scratch.empty(weight_DF.shape[1], len(weight_DF), dtype=WIDE)
        for rows, weight_BF in wide_blocks(weight_DF, device):
            weight_FD[:, rows] = weight_BF.T
        gone_FD = eliminate_(weight_FD, self.root, self.masks)
        return _Sparse(gone_FD.T, weight_FD.T)

    def _importance(self) -> Tensor:
        """What |w| counts for, by input (F)."""
        energy_F = self.statistic.column_energy
        return energy_F.sqrt() if self.masks.score == "wanda" else torch.ones_like(energy_F)


def smallest_gone(weight_DF: Tensor, importance_F: Tensor, masks: Masks) -> Tensor:
    """The weights with the smallest |w| times the importance of what they read (D, F), bool.

    They are counted in every group of neighbouring inputs; without groups in every output (Wanda),
    by magnitude alone in the whole matrix. Of equals the first go.
    """
    device = importance_F.device
    if masks.group is None and masks.score == "magnitude":
        scores_1C = weight_DF.to(device).abs().reshape(1, -1)
        return _smallest(scores_1C, int(masks.sparsity * weight_DF.numel())).view(weight_DF.shape)
    gone_DF = torch.empty(weight_DF.shape, dtype=torch.bool, device=device)
    columns = masks.group or weight_DF.shape[1]
    for rows, weight_BF in wide_blocks(weight_DF, device):
        scores_RC = weight_BF.abs_().mul_(importance_F).reshape(-1, columns)
        gone_DF[rows] = _smallest(scores_RC, int(masks.sparsity * columns)).view(weight_BF.shape)
    return gone_DF


def eliminate_(weight_FD: Tensor, root: Callable[[slice], Tensor], masks: Masks) -> Tensor:
    """Make zeros input by input, in place; which weights went (F, D), bool.

    `root` gives rows of R. What goes is chosen where a group begins, without groups where a block
    does, from the weights as they then are.
    """
    width, outputs = weight_FD.shape
    gone_FD = torch.zeros(weight_FD.shape, dtype=torch.bool, device=weight_FD.device)
    for start in range(0, width, BLOCK_INPUTS):
        inputs = slice(start, min(start + BLOCK_INPUTS, width))
        block_BD, gone_BD = weight_FD[inputs], gone_FD[inputs]
        root_BF = root(inputs)[:, start:]
        errors_BD = torch.empty_like(block_BD)
        at_once = masks.group or len(block_BD)
        for j in range(len(block_BD)):
            if j % at_once == 0:
                some = slice(j, j + at_once)
                costs = (block_BD[some] / torch.diagonal(root_BF)[some, None]).square()
                by_group = costs.T if masks.group else costs.reshape(1, -1)
                gone = _smallest(by_group, int(masks.sparsity * by_group.shape[1]))
                gone_BD[some] = gone.T if masks.group else gone.view(-1, outputs)
            errors_BD[j] = block_BD[j].mul(gone_BD[j]).div_(root_BF[j, j])
            block_BD[j + 1 :].addr_(root_BF[j, j + 1 : len(block_BD)], errors_BD[j], alpha=-1)
        block_BD.masked_fill_(gone_BD, 0.0)
        weight_FD[inputs.stop :].addmm_(root_BF[:, len(block_BD) :].T, errors_BD, alpha=-1)
    return gone_FD


def _smallest(scores_RC: Tensor, count: int) -> Tensor:
    """The `count` smallest of every row, bool; of equals the first."""
    order_RC = torch.argsort(scores_RC, dim=1, stable=True)[:, :count]
    gone_RC = torch.zeros(scores_RC.shape, dtype=torch.bool, device=scores_RC.device)
    return gone_RC.scatter_(1, order_RC, True)
