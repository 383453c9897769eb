"""Recovery of every layer alone, towards what the dense model's makes of the same input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.store.layout import recovered_task, task_folder
from rayprune.workers.store.training_stage import read_log
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

RECOVER: dict[str, Any] = {
    "scope": "layer",
    "batch": 4,
    "epochs": 4,
    "learning_rate": 3e-3,
    "checkpoint_steps": 2,
}


def logs(run: Path, count: int) -> list[list[dict[str, Any]]]:
    return [read_log(task_folder(run, recovered_task(layer))) for layer in range(count)]


@pytest.mark.parametrize(
    "more",
    [
        {"micro_batch": 3},
        {"lora": {"rank": 4}, "held_out": {"windows": 2, "every": 2}, "dtype": "bfloat16"},
    ],
)
def test_every_layer_comes_nearer_to_the_dense_one(
    more: dict[str, Any], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Also after an interruption, with the same bytes; what is outside the layers stays."""
    sections = {"budget": {"kv_groups": 1}, "recover": RECOVER | more}
    job, run = load_job(make_job(make_model(num_hidden_layers=2), **sections)), tmp_path / "run"
    report = run_job(job, run, quiet)
    verify_run(run)
    for log in logs(run, 2):
        assert "penalty" not in log[0]
        losses = [line["transfer"] for line in log]
        assert sum(losses[-3:]) < sum(losses[:3])
    assert "transfer" in report.training["recovered layers"].curves
    assert report.recovered_model is not None
    pruned, recovered = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (report.pruned_model, report.recovered_model)
    )
    changed = {name for name, tensor in pruned.items() if not torch.equal(tensor, recovered[name])}
    assert changed == {
        name for name in pruned if ".layers." in name and ("lora" not in more or "proj" in name)
    }

    def cut_off(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event["stage"] == "recover":
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_job(job, cut, cut_off)
    run_job(job, cut, quiet)
    assert folder_bytes(cut / "tasks/recover/model") == folder_bytes(report.recovered_model)


def lost(found: Tensor, given: Tensor, wanted: Tensor) -> float:
    """The error relative to the target's length, over that of a layer that does nothing."""
    lengths = wanted.square().sum(-1)
    error, nothing = (
        ((wanted - other).square().sum(-1) / lengths).mean() for other in (found, given)
    )
    return float(error / nothing)


def test_a_layer_stands_for_the_dense_ones_that_are_gone_behind_it(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Layers 2 and 4 of 0 to 4 stay, as they are: their first losses are known."""
    dense, run = make_model(num_hidden_layers=5), tmp_path / "run"
    budget = {"sparsity": None, "round_to": "auto", "drop_layers": [0, 1, 3]}
    recover = RECOVER | {"batch": 1000, "epochs": 0.1, "warmup": 0.0}
    run_job(load_job(make_job(dense, budget=budget, recover=recover)), run, quiet)
    verify_run(run)
    windows = load_file(task_folder(run, "recovery-tokens") / "tokens.safetensors")["tokens"]
    model: Any = AutoModelForCausalLM.from_pretrained(dense).model
    position = model.rotary_emb(model.embed_tokens(windows), torch.arange(windows.shape[1])[None])

    def passed(hidden: Tensor, *numbers: int) -> Tensor:
        for number in numbers:
            hidden = model.layers[number](hidden, position_embeddings=position)
        return hidden

    with torch.no_grad():
        first = model.embed_tokens(windows)
        second = passed(first, 2)
        expected = [
            lost(second, first, passed(first, 0, 1, 2, 3)),
            lost(passed(second, 4), second, passed(second, 4)),
        ]
    found = [log[0]["transfer"] for log in logs(run, 2)]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_layers_are_told_from_each_other_where_more_is_pruned_behind_them(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    budget = {"sparsity": 0.5, "drop_layers": [1], "kv_groups": 1}
    job = load_job(make_job(make_model(num_hidden_layers=3), budget=budget, recover=RECOVER))
    run_job(job, run := tmp_path / "run", quiet)
    verify_run(run)
    first, second = logs(run, 2)
    assert first[0]["transfer"] > second[0]["transfer"]  # it is to do two layers' work
