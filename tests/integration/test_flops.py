"""Each weight matrix meets the calibration activations once: counted with torch's own counter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import rayprune.workers.steps.deciding
from rayprune.orchestrator.cli import main
from rayprune.specs.loader import load_job
from rayprune.workers.calibration import calibration_windows, load_tokenizer
from rayprune.workers.numerics import statistics
from tests.conftest import MakeJob, MakeModel

MATRIX_PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
)


def matrix_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products; attention's own products (no weight in them) are counted apart
    by torch.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(value for operator, value in counts.items() if operator in MATRIX_PRODUCTS)


@pytest.mark.slow
@pytest.mark.parametrize("kv_groups", [2, 1, "auto"])
def test_sweep_costs_about_one_forward_pass(
    kv_groups: int | str,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products with weights in probe and sweep, against one dense forward pass of the decoder over
    the calibration set.
    """
    dense = make_model(num_hidden_layers=8)
    probed = {"probe_samples": 2} if kv_groups == "auto" else {}
    path = make_job(dense, budget={"kv_groups": kv_groups, **probed})
    job = load_job(path)
    windows = calibration_windows(job.calibration, load_tokenizer(dense))
    model = AutoModelForCausalLM.from_pretrained(dense)
    forward = matrix_flops(lambda: model.model(windows, use_cache=False))

    inside = FlopsWithoutStatistics(monkeypatch)
    total = matrix_flops(
        lambda: main(
            ["run", str(path), "--out", str(tmp_path / "run"), "--set", "parallel.micro_batch=16"]
        )
    )
    gate = matrix_flops(lambda: model(torch.arange(8)[None]))
    assert 0.8 < (total - inside.statistics - gate) / forward < 1.15


class FlopsWithoutStatistics:
    """Counts apart what statistics, selection and correction multiply: Gram products, solves,
    errors.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statistics = 0
        for owner, name in (
            (statistics.GramStatistic, "update"),
            (rayprune.workers.steps.deciding.Deciding, "cut"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = function(*args, **kwargs)
            self.statistics += sum(
                v for k, v in counter.get_flop_counts()["Global"].items() if k in MATRIX_PRODUCTS
            )
            return result

        return counted
