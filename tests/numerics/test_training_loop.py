"""The training loop: what a step is must not depend on how it is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rayprune.specs.training import TrainingSpec
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.training_stage import read_log
from rayprune.workers.training.loop import ALONE, Training, load_for_training
from rayprune.workers.training.objectives import Objective
from tests.conftest import MakeModel

WINDOWS_ST = torch.randint(3, 259, (6, 16), generator=torch.Generator().manual_seed(0))


def first_step(model: Path, folder: Path, micro_batch: int) -> dict[str, Any]:
    """What is logged of the only step, over all windows."""
    options = TrainingSpec(batch=6, micro_batch=micro_batch, warmup=0.0)
    checkpoint = open_checkpoint(model)
    whole, objective = load_for_training(checkpoint, options, ALONE), Objective(checkpoint.model)
    Training(whole, objective, WINDOWS_ST, options, folder, ALONE).run()
    (step,) = read_log(folder)
    return step


@pytest.mark.parametrize("micro_batch", [1, 4, 5])
def test_a_short_micro_batch_counts_for_what_it_holds(
    micro_batch: int, make_model: MakeModel, tmp_path: Path
) -> None:
    """Of six windows the second of two micro-batches holds two, or one."""
    model = make_model(num_hidden_layers=1)
    together = first_step(model, tmp_path / "together", 6)
    apart = first_step(model, tmp_path / "apart", micro_batch)
    for name in ("loss", "gradient_norm"):
        assert apart[name] == pytest.approx(together[name], rel=1e-5)
