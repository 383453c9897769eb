"""What a statistic of calibration activations answers, whatever it is made of.

Letters: T tokens, F width, D hidden, K kept columns, B block of output rows.
"""

from collections.abc import Callable
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.codec import to_array
from rayprune.workers.numerics.damping import Blocks
from rayprune.workers.numerics.linalg import Solver

State = dict[str, np.ndarray]
"""A statistic as it travels between workers."""
Tensors = dict[str, Tensor]
"""The same where it lies."""


class Refit(Protocol):
    """The correction problem of one kept set: min over C of |Z_K C - Z_P W_P'|^2 + ridge |C|^2, C
    the change of W_K.

    `targets` is computed once; `solver` factors once for each ridge; then it solves for block after
    block of targets.
    """

    def targets(self, weight_DF: Tensor) -> Tensor:
        """The right sides as rows, one for each output, fp64; `weight_DF` has any type and is read
        in blocks.
        """
        ...

    def solver(self, ridge: float) -> Solver:
        """From a block of targets to the best change C_BK of the kept columns, shrunk towards no
        change by the ridge.

        Raises:
            ModelError: the problem is singular.
        """
        ...

    def misfit(self, change_BK: Tensor, target_BM: Tensor, ridge: float) -> float:
        """|Z_K C' - Z_P W_P' - E|^2 of what `solver` with this ridge has found for these targets,
        less its share of the remainder, fp64.
        """
        ...

    def remainders(self, weight_DF: Tensor) -> Blocks:
        """What misfits leave out, by blocks of outputs, since it does not depend on the ridge."""
        ...


class Judge(Protocol):
    """What some tokens say of changes that were found on others."""

    def misfit(self, rows: slice, weight_BF: Tensor, change_BK: Tensor) -> float:
        """|Z_K C' - Z_P W_P' - E|^2 for some outputs, their weight and the change C of its kept
        columns, less their share of the remainder, fp64.
        """
        ...

    def remainders(self, weight_DF: Tensor) -> Blocks:
        """What misfits leave out, by blocks of outputs, since it does not depend on the change."""
        ...


class Travelling:
    """A statistic that stays as it is in its process, and leaves it as its state."""

    def tensors(self) -> Tensors:
        """The statistic as tensors, in its own memory."""
        raise NotImplementedError

    def state(self) -> State:
        """The statistic as arrays."""
        return {name: to_array(tensor) for name, tensor in self.tensors().items()}

    def __reduce__(self) -> tuple[Callable[..., State], tuple[State]]:
        return dict, (self.state(),)


class Statistic(Protocol):
    """A sum over calibration tokens from which units are selected and corrections solved.

    Pickled it is its `state`: it is copied only where it leaves the process.
    """

    @property
    def scratch(self) -> Scratch:
        """Where its large matrices lie."""
        ...

    @classmethod
    def empty(cls, width: int, scratch: Scratch, drift_width: int = 0) -> Self:
        """The statistic of no tokens; with a `drift_width` (D) of tokens whose drift is known."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Tensors, scratch: Scratch) -> Self:
        """Rebuild what `tensors` gave, in the memory of these."""
        ...

    @classmethod
    def from_state(cls, state: State, scratch: Scratch) -> Self:
        """Rebuild what `state` wrote; its arrays are only read."""
        ...

    def update(self, z_TF: Tensor, drift_TD: Tensor | None = None) -> None:
        """Add one micro-batch of the consumer's input. It may be kept, so it must not be written to
        later.

        `drift_TD` is what the consumer's output should have besides, given exactly if the statistic
        has a drift width.
        """
        ...

    def merge(self, other: Self) -> Self:
        """The statistic of both token sets; neither operand may be used again."""
        ...

    def finished(self) -> Self:
        """This statistic, ready for the questions below: to be called after the last update or
        merge.
        """
        ...

    def tensors(self) -> Tensors:
        """The statistic as tensors, in its own memory."""
        ...

    def state(self) -> State:
        """The statistic as arrays."""
        ...

    @property
    def num_tokens(self) -> int:
        """T."""
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
        """Variance of every column over the tokens, fp64, from sums and products in fp32: of a
        column whose mean is a thousand times its deviation one digit is right.
        """
        ...

    def gram(self) -> Tensor:
        """Z'Z, F x F, fp64, only to be read. Cost on rows: N F^2 flops, and the matrix in
        `Scratch`.
        """
        ...

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        ...

    def order(self, scale_F: Tensor, unit: int, count: int, shrinkage: float = 0.0) -> Tensor:
        """The first `count` units (of `unit` columns each) of greedy pivoting on Z diag(scale), of
        a Gram matrix with `shrinkage` of all correlations taken away.
        """
        ...

    def refit(self, kept_K: Tensor) -> Refit:
        """The correction problem for these kept columns, which ascend."""
        ...

    def energy(self, rows_BF: Tensor) -> float:
        """|Z M'|^2 for a block M of rows, fp64: the squared output of a weight, or of a change of
        one.
        """
        ...

    def of_outputs(self, rows: slice) -> Self:
        """The same, for some outputs alone; their memory is shared."""
        ...

    def judge(self, weight_DF: Tensor, kept_K: Tensor) -> "Judge":
        """What tells how well changes of these kept columns serve on these tokens."""
        ...


def complement(kept_K: Tensor, width: int) -> Tensor:
    """Indices 0 ... width-1 that are not kept, ascending."""
    mask = torch.ones(width, dtype=torch.bool, device=kept_K.device)
    mask[kept_K] = False
    return mask.nonzero().flatten()
