"""A training stage as data, on its way from the driver to the ranks. No torch."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specs.job import CalibrationSpec
from specs.training import TrainingSpec

LOG_FILE = "training.jsonl"
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


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What was logged, step by step; a line torn by a crash is left out."""
    lines = []
    for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines() if (folder / LOG_FILE).exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
