"""What a job's method says about itself. Stages, plan and workers ask these questions and know no
method by its name or class.

Letters: F width of a consumer's input, D hidden, n rows, P columns removed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rayprune.specs.methods.gate import GateSpec
from rayprune.specs.section import Section
from rayprune.specs.training import Loss, Norm, TrainingSpec

Damping = Annotated[float, Field(gt=0.0, le=1e6)]
Site = Literal["qkv", "o", "up", "down"]
SITES: tuple[Site, ...] = ("qkv", "o", "up", "down")
"""The matrices of a layer, together where they read the same, in the order in which they do."""


@dataclass(frozen=True)
class RankedGroup:
    """The sizes that the cost of ranking one block of a coupled group depends on."""

    width: int
    """F."""
    hidden: int
    """D."""
    removed: int
    """P."""
    rows: int
    """n: rows of the matrix that is factorised; F for a Gram matrix."""
    in_rows: bool
    """Whether the statistic is rows (or their R factor) instead of a Gram matrix."""

    @property
    def product_flops(self) -> int:
        """Operations that form the Gram matrix where only rows are kept: 2 n F^2."""
        return 2 * self.rows * self.width**2 if self.in_rows else 0

    @property
    def product_bytes(self) -> int:
        """Bytes of the Gram matrix that is formed where only rows are kept: F^2 8."""
        return 8 * self.width**2 if self.in_rows else 0


@dataclass(frozen=True)
class DriveOut:
    """A training before the cut: the units that will go are chosen first and driven towards
    zero.
    """

    training: TrainingSpec
    strength: float
    """How far the penalty takes a unit's norm down over the whole training; 1: to zero."""
    norm: Norm
    loss: Loss
    """What is minimised beside the penalty."""
    each_layer: bool
    """Whether every layer is trained by itself."""
    seed: int | None
    """Seed of a random choice of the units; None: the method's `selector` chooses them."""

    @property
    def trainings(self) -> tuple[TrainingSpec, ...]:
        """One."""
        return (self.training,)


@dataclass(frozen=True)
class TakeOver:
    """Trainings before the cut: gates choose the layers that will go, then the others take over
    what they do.
    """

    loss: Loss
    """What is minimised in all trainings, beside penalties."""
    gates: TrainingSpec
    """The training of the gates, once for every layer that goes."""
    gate_strength: float
    """Weight of the l1 norm of the gates beside the loss."""
    training: TrainingSpec
    """The training of all weights."""
    transfer: Literal["shrink", "penalty"]
    """Whether the layers' updates are scaled down, or a penalty on them is added to the loss."""
    strength: float
    """`shrink`: how far the updates are scaled down; `penalty`: its weight."""
    norm: Norm
    """`penalty`: norm of an update."""
    protect_first: int
    """So many of the first layers stay."""
    protect_last: int
    """So many of the last layers stay."""

    @property
    def trainings(self) -> tuple[TrainingSpec, ...]:
        """Gates, then all weights."""
        return (self.gates, self.training)


@dataclass(frozen=True)
class InSteps:
    """Several passes over a model, each over what the one before has left."""

    sparsities: tuple[float, ...]
    """What is gone after each, of the original's decoder-layer parameters."""
    gate: GateSpec
    """What each must keep of the original."""
    keeps: bool
    """Whether the models of all of them stay."""


@dataclass(frozen=True)
class Masks:
    """Weights that become zero where no unit goes."""

    pattern: str
    """Its name in a job."""
    score: Literal["magnitude", "wanda", "obs"]
    """Which weights go; with `obs` the others are corrected."""
    sites: tuple[Site, ...]
    """The matrices that get zeros, in the order in which a layer computes them."""
    group: int | None
    """Zeros are counted in so many neighbouring weights of an output; None: in a whole matrix."""
    sparsity: float
    """Fraction of those that become zero."""
    damping: float
    """Ridge of the correction, as a multiple of the mean diagonal; 0: there is none."""


class MethodOptions(Section):
    """Base of every method's options."""

    name: str

    @property
    def needs_rows(self) -> bool:
        """Whether rows of activations are kept instead of a Gram matrix, however many tokens there
        are.
        """
        return False

    @property
    def gradient_windows(self) -> int:
        """Calibration windows on which gradients of the loss are measured; 0: they are not
        needed.
        """
        return 0

    @property
    def comparable_scores(self) -> bool:
        """Whether the scores of units of different layers can be compared; the ranking's module
        then has a function `scores`.
        """
        return False

    @property
    def read_by_threshold(self) -> tuple[str, ...]:
        """Options that nothing but `allocation: threshold` reads."""
        return ()

    def weighted_scores(
        self, scores: Mapping[str, Sequence[float]], unit_parameters: Mapping[str, int]
    ) -> dict[str, list[float]]:
        """A layer's scores by group, as one threshold over all groups compares them;
        `unit_parameters` are those of one unit of each group.
        """
        return {name: list(units) for name, units in scores.items()}

    def ranking_flops(self, group: RankedGroup) -> int:
        """Floating-point operations of ranking the units of one block of a group; 0: next to
        none.
        """
        return 0

    def ranking_bytes(self, group: RankedGroup) -> int:
        """Bytes that ranking takes beside the statistic, in the statistic's scratch; 0: next to
        none.
        """
        return 0

    @property
    def selector(self) -> "MethodOptions":
        """The method that ranks the units of a layer."""
        return self

    @property
    def before_cut(self) -> DriveOut | TakeOver | None:
        """What is trained before the cut."""
        return None

    @property
    def masks(self) -> Masks | None:
        """The zeros that it makes inside matrices, instead of removing units; None: it removes
        units.
        """
        return None

    @property
    def cuts_first(self) -> "MethodOptions | None":
        """The method by which units go before zeros are made; None: no pass goes before."""
        return None

    def in_steps(self, sparsity: float) -> InSteps | None:
        """The passes on the way to a sparsity; None: it is one pass, and no gate behind it."""
        return None

    @property
    def selects_first(self) -> bool:
        """Whether the units that go are chosen before anything is trained."""
        return isinstance(self.before_cut, DriveOut)

    @property
    def removes_nothing(self) -> bool:
        """Whether the model stays as it is, and is only trained and judged."""
        return False

    @property
    def removes_layers(self) -> bool:
        """Whether whole layers go, and nothing else."""
        return isinstance(self.before_cut, TakeOver)

    @property
    def trainings(self) -> tuple[TrainingSpec, ...]:
        """The trainings before the cut."""
        return self.before_cut.trainings if self.before_cut else ()

    @property
    def trains_layers_alone(self) -> bool:
        """Whether the training before the cut takes every layer by itself."""
        return isinstance(self.before_cut, DriveOut) and self.before_cut.each_layer
