"""A training stage as data, on its way from the driver to the ranks. No torch."""

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayprune.specs.memory import MemoryPlan
from rayprune.specs.texts import WindowsSpec
from rayprune.specs.training import LoraSpec, Norm, RecoverSpec, TrainingSpec
from rayprune.workers.store.files import write_text
from rayprune.workers.store.layout import STARTED_FILE
from rayprune.workers.store.logs import TrainingLine, read_lines

LOG_FILE = "training.jsonl"
STATE_PREFIX = "step-"
Removed = Mapping[str, Collection[int]]
"""Units of a layer that will go, by group."""


@dataclass(frozen=True)
class Penalty:
    """The units that a group penalty drives out, by layer."""

    removed: Sequence[Removed]
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
class Shrink:
    """The layers whose updates are scaled down."""

    removed: Sequence[int]
    strength: float


@dataclass(frozen=True)
class Recovery:
    """Training of a pruned model: on the text alone, or from a teacher; of all weights, or of
    adapters.
    """

    teacher: str | None = None
    hidden: float = 0.0
    lora: LoraSpec | None = None
    taught: str | None = None
    """Folder of what the teacher has said of every window, so that it need not be there."""


@dataclass(frozen=True)
class Goal:
    """What every layer of a pruned model is to give: what layers of the dense model make of the
    same input.
    """

    model: str
    """Folder of the dense model."""
    tokens: str
    """File of the windows."""
    bounds: Sequence[int]
    """The dense layers `bounds[n]` to `bounds[n + 1]` are those whose work layer n is to do: itself
    before the cut, and whole layers that are gone behind it (of the first also before it).
    """


@dataclass(frozen=True)
class HeldOut:
    """Windows that are not trained on, and when they are looked at."""

    numbers: Sequence[int]
    every: int
    patience: int | None


@dataclass(frozen=True)
class Alone:
    """The training of a layer by itself."""

    options: TrainingSpec
    penalty: Penalty | None = None
    """On the units of this one layer that will go."""
    lora: LoraSpec | None = None
    held_out: HeldOut | None = None


Aim = Penalty | Gates | Updates | Shrink | Recovery
"""What a training is for."""


@dataclass(frozen=True)
class Finetune:
    """One training stage, as it goes to the ranks."""

    model: str
    """Folder of the model to begin with."""
    folder: str
    """The task's folder: log, checkpoints, and in the end the trained model."""
    text: WindowsSpec | str
    """What is trained on, or the file of its windows, where it was tokenised before."""
    options: TrainingSpec
    aim: Aim
    threads: int = 1
    held_out: HeldOut | None = None
    from_itself: bool = False
    """Before the cut: whether the model to begin with is the teacher too."""


def as_planned(stage: Finetune, memory: MemoryPlan) -> Finetune:
    """A training whose options are settled: what the job leaves open is as the plan says."""
    if stage.options.activation_checkpointing != "auto":
        return stage
    planned = {"activation_checkpointing": not memory.keep_activations}
    return replace(stage, options=stage.options.model_copy(update=planned))


RATE, ADAPTERS_RATE, RATED_PARAMETERS = 3e-4, 1e-3, 135e6
"""Learning rates of a recovery, of all weights and of adapters, of a model of so many parameters:
what served SmolLM2-135M (docs/training.md). Beyond they fall with the root of the size, which meets
what is common at 7B; below they stay.
"""


def settled(options: RecoverSpec, parameters: int) -> RecoverSpec:
    """A recovery's options with a rate that is a number, for a dense model of so many
    parameters.
    """
    if options.learning_rate != "auto":
        return options
    rate = ADAPTERS_RATE if options.lora else RATE
    rate *= min(1.0, math.sqrt(RATED_PARAMETERS / parameters))
    return options.model_copy(update={"learning_rate": rate})


def total_steps(options: TrainingSpec, num_windows: int) -> int:
    """Steps of a training on so many windows."""
    # 1.1 times 100 is a little more than 110
    return max(1, math.ceil(round(num_windows * options.epochs / options.batch, 6)))


def saved_states(options: TrainingSpec, num_windows: int) -> int:
    """Saved states that lie on disk at the same time, at most: the last one is removed when the
    next one is whole; none is saved behind the last step.
    """
    saves = (total_steps(options, num_windows) - 1) // options.checkpoint_steps
    return min(2, saves)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What was logged, step by step; a line that is none (torn by a crash, or odd) is left out."""
    return read_lines(folder / LOG_FILE, TrainingLine)


def forget_another(folder: Path, expected: str) -> None:
    """Remove what a training with other options or from another model has left, so that this one
    does not go on from there.
    """
    started = folder / STARTED_FILE
    if not started.is_file() or started.read_bytes() != expected.encode():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(started, expected)


def forget_states(folder: Path) -> None:
    """Remove the saved states of a training that has ended."""
    for state in folder.glob(f"{STATE_PREFIX}*"):
        shutil.rmtree(state)
