"""A training stage as data, on its way from the driver to the ranks. No torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from specs.job import CalibrationSpec
from specs.training import TrainingSpec

Norm = Literal["l1", "l2"]


@dataclass(frozen=True)
class Penalty:
    """The units that a group penalty drives out: by layer and group."""

    removed: Sequence[Mapping[str, Collection[int]]]
    strength: float
    norm: Norm


@dataclass(frozen=True)
class Gates:
    """Layer gates to begin with, and the layers that are left out already."""

    initial: Sequence[float]
    removed: Sequence[int]
    strength: float


@dataclass(frozen=True)
class Updates:
    """The layers whose updates are driven to zero."""

    removed: Sequence[int]
    strength: float
    norm: Norm


@dataclass(frozen=True)
class Recovery:
    """Training of a pruned model: on the text alone, or from a teacher."""

    teacher: str | None = None
    hidden: float = 0.0


Aim = Penalty | Gates | Updates | Recovery
"""What a training is for."""


@dataclass(frozen=True)
class Finetune:
    """One training stage, as it goes to the ranks."""

    model: str
    """Folder of the model to begin with."""
    folder: str
    """The task's folder: log, checkpoints, and in the end the trained model."""
    text: CalibrationSpec
    options: TrainingSpec
    aim: Aim
    threads: int = 1
