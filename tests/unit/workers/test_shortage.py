"""Memory that runs out, really: whoever notices it, the user gets a resource error that says what
to do.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.orchestrator import cli
from rayprune.orchestrator.commands import jobs
from rayprune.specs.calibration import CalibrationSpec
from rayprune.specs.errors import ResourceError
from rayprune.specs.training import TrainingSpec
from rayprune.workers.store.training_stage import Finetune, Gates
from rayprune.workers.training import rank
from rayprune.workers.training.loop import ALONE
from rayprune.workers.worker import Worker
from tests.conftest import MakeJob, MakeModel

TOO_MANY_BYTES = 2**50
"""More than a process can address."""


def torch_takes() -> object:
    """A RuntimeError of torch's allocator."""
    return torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)


def numpy_takes() -> object:
    """A MemoryError of a class of numpy's own."""
    return np.empty(TOO_MANY_BYTES, dtype=np.uint8)


def python_takes() -> object:
    """A MemoryError without words."""
    return bytearray(TOO_MANY_BYTES)


TAKES = [torch_takes, numpy_takes, python_takes]


class Hungry(Worker):
    """A worker whose step does as it is told."""

    def __init__(self) -> None:
        """Needs no job."""
        self._steps = {"work": lambda what: what()}


@pytest.mark.parametrize("take", TAKES)
def test_a_step_without_memory_is_a_resource_error(take: Callable[[], object]) -> None:
    with pytest.raises(ResourceError, match=r"work: out of memory \(.+\): lower parallel"):
        Hungry().run("work", take)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(2, "no file"), KeyError("a")])
def test_other_errors_of_a_step_stay_what_they_are(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Hungry().run("work", fail)
    assert caught.value is error


def test_evaluation_without_memory_is_a_resource_error(
    monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """The command ends with 4 and no traceback."""
    monkeypatch.setattr("rayprune.workers.steps.judging.compared", lambda *_: torch_takes())
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("Nothing of this stands in the other text. " * 40)
    evaluation = {"path": str(held_out), "window": 16, "max_windows": 2}
    job = make_job(make_model(num_hidden_layers=1), evaluation=evaluation)
    assert cli.main(["run", str(job), "--out", str(tmp_path / "run")]) == 4


def test_a_rank_without_memory_is_a_resource_error(
    monkeypatch: pytest.MonkeyPatch, make_model: MakeModel, tmp_path: Path
) -> None:
    monkeypatch.setattr(rank, "calibration_windows", lambda *_: torch_takes())
    stage = Finetune(
        str(make_model()),
        str(tmp_path),
        CalibrationSpec(path="text"),
        TrainingSpec(),
        Gates([], [], 0.0),
        1,
    )
    with pytest.raises(ResourceError, match=r"training, rank 0: out of memory .* micro_batch"):
        rank.train_rank(stage, ALONE)


@pytest.mark.parametrize("take", TAKES)
def test_a_command_without_memory_ends_with_4(
    take: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(jobs, "_validate", lambda _: take())
    assert cli.main(["validate", "job.yaml"]) == 4
    assert capsys.readouterr().err.startswith("rayprune: out of memory")
