"""Every kind of budget, measured on the folder that was written, not on the plan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel
from tests.helpers import quiet, some


@torch.inference_mode()
def measured(folder: Path) -> dict[str, float]:
    """What an exported model takes, by loading and running it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with FlopCounterMode(display=False) as counter:
        cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
    flops = {
        str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()
    }
    attention = sum(
        count for operator, count in flops.items() if "attention" in operator or "bmm" in operator
    )
    stored = [
        handle
        for file in folder.glob("*.safetensors")
        for handle in [safe_open(file, framework="pt")]
    ]
    # not a dict
    tensors = [handle.get_tensor(name) for handle in stored for name in handle.keys()]  # noqa: SIM118
    layers = [layer for layer in cache.layers if layer.keys is not None]
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "flops_per_token": sum(flops.values()) - attention,
        "kv_bytes_per_token": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
    }


TARGETS = ("parameters", "weight_bytes", "flops_per_token")


@pytest.mark.parametrize("model_type", some(["llama", "qwen2", "gemma"], "llama"))
@pytest.mark.parametrize(
    "kind", some(["parameters", "weight_bytes", "flops_per_token"], "parameters")
)
def test_the_exported_model_meets_its_budget_within_one_unit(
    kind: str, model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(model_type)
    whole = measured(dense)
    # 4 channels
    unit = {
        "parameters": 4 * 3 * 32 * 3,
        "weight_bytes": 4 * 4 * 3 * 32 * 3,
        "flops_per_token": 2 * 4 * 3 * 32 * 3,
    }[kind]
    for fraction in (0.93, 0.8):
        limit = round(fraction * whole[kind])
        job = load_job(make_job(dense, budget={"sparsity": None, kind: limit, "kv_groups": 2}))
        run_job(job, tmp_path / f"run-{fraction}", quiet)
        assert limit - unit < measured(tmp_path / f"run-{fraction}" / "model")[kind] <= limit


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "llama", "mixtral"])
def test_the_cache_is_what_transformers_keeps(model_type: str, make_model: MakeModel) -> None:
    """Of latent attention the latents, whatever heads there are."""
    folder = make_model(model_type)
    model = open_checkpoint(folder).model
    assert 4 * model.cached_numbers == measured(folder)["kv_bytes_per_token"]
    heads = next(group for group in model.groups if group.kind == "attention")
    assert heads.cached_of(0) == 0
    latent = model_type.startswith("deepseek")
    assert (heads.cached_of(1) == heads.cached_of(heads.num_units)) == latent


def test_a_budget_for_the_cache_removes_kv_groups_and_no_more(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model("qwen3", num_attention_heads=8, num_key_value_heads=8)
    limit = round(measured(dense)["kv_bytes_per_token"] * 0.7)
    report = run_job(
        load_job(make_job(dense, budget={"sparsity": None, "kv_bytes_per_token": limit})),
        tmp_path / "run",
        quiet,
    )
    assert (report.shape["heads"], report.shape["neurons"]) == (5, 48)
    assert measured(tmp_path / "run" / "model")["kv_bytes_per_token"] == limit // (
        2 * 3 * 8 * 4
    ) * (2 * 3 * 8 * 4)


def test_all_targets_are_met_together(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model("mistral")
    whole = measured(dense)
    limits = {
        "weight_bytes": round(whole["weight_bytes"] * 0.9),
        "kv_bytes_per_token": round(whole["kv_bytes_per_token"] * 0.5),
    }
    run_job(load_job(make_job(dense, budget={"sparsity": 0.4} | limits)), tmp_path / "run", quiet)
    taken = measured(tmp_path / "run" / "model")
    assert all(taken[name] <= limit for name, limit in limits.items())


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"sparsity": None, "parameters": 10}, "raise budget.parameters"),
        ({"sparsity": None, "kv_bytes_per_token": 10}, "raise budget.kv_bytes_per_token"),
        ({"sparsity": None, "weight_bytes": "1GiB"}, "the model meets every target as it is"),
        ({"parameters": 10, "sparsity": 0.9}, "lower budget.sparsity"),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_target(
    budget: dict[str, Any],
    words: str,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: Any,
) -> None:
    assert (
        main(["run", str(make_job(make_model(), budget=budget)), "--out", str(tmp_path / "run")])
        == 2
    )
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"sparsity": None, "weight_bytes": "1GiB"}, "the model meets every target as it is"),
        (
            {"sparsity": 0.6},
            (
                "2 of 3 layers have to go, more than method.protect_first (1) and"
                " method.protect_last (1) leave open"
            ),
        ),
    ],
)
def test_a_budget_of_whole_layers_that_cannot_be_met_is_refused_before_training(
    budget: dict[str, Any],
    words: str,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: Any,
) -> None:
    method = {"name": "trsp", "protect_first": 1, "protect_last": 1}
    assert (
        main(
            [
                "run",
                str(make_job(make_model(), budget=budget, method=method)),
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    assert words in " ".join(capsys.readouterr().err.split())
