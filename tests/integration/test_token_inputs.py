"""Layers that are given more than hidden states, as those of Gemma 4's E2B: inputs made of the
tokens, and keys and values that layers before have left.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.planning.footprint import footprint
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint, planned_checkpoint
from tests.conftest import MakeJob, MakeModel, edit_json, folder_bytes, write_job
from tests.helpers import quiet, some
from tests.models import build_model

KIND = "gemma4_text-readers"
MORE_LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
"""The last two read keys and values of layers 2 and 3."""
WAYS: dict[str, dict[str, Any]] = {
    "shards": {"placement": "shards"},
    "layers": {"placement": "layers"},
}

PADDED = ["budget.per_layer=true", "export.pad=true"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Path]:
    """A job for each placement, saved after every layer."""
    folder = tmp_path_factory.mktemp("readers")
    model = build_model(folder / "dense", KIND, **MORE_LAYERS)
    return {
        name: write_job(
            folder / f"{name}.yaml",
            text_file,
            model,
            calibration={"samples": 8},
            memory={"checkpoint_layers": 1},
            parallel=way,
        )
        for name, way in WAYS.items()
    }


@pytest.fixture(scope="module")
def expected(jobs: dict[str, Path]) -> dict[str, dict[str, bytes]]:
    """The exported folders of undisturbed runs."""
    for name, job in jobs.items():
        run_job(load_job(job), job.parent / name, quiet)
    return {name: folder_bytes(job.parent / name / "model") for name, job in jobs.items()}


@pytest.mark.parametrize("stop_after", some([1, 2, 3, 4], 4))
@pytest.mark.parametrize("way", WAYS)
def test_a_restart_takes_up_what_layers_have_left(
    way: str, stop_after: int, jobs: Any, expected: Any, tmp_path: Path, force_memory: Any
) -> None:
    """From saved states; hidden states and inputs wait in files."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("layer") == stop_after:
            raise KeyboardInterrupt

    memory = {"layers_per_chunk": 2} if way == "layers" else {"spill_hidden": True}
    force_memory(**memory)
    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(jobs[way]), tmp_path / "run", stop)
    again: list[dict[str, Any]] = []
    run_job(load_job(jobs[way]), tmp_path / "run", again.append)
    assert "computed again" not in str(again)
    assert folder_bytes(tmp_path / "run/model") == expected[way]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("way", WAYS)
def test_workers_give_the_same_bytes(way: str, jobs: Any, expected: Any, tmp_path: Path) -> None:
    settings = ["cluster.executor=ray", "parallel.workers=2"]
    run_job(load_job(jobs[way], settings), tmp_path / "ray", quiet)
    assert folder_bytes(tmp_path / "ray/model") == expected[way]


@pytest.mark.parametrize("gone", [0, 4])
def test_a_layer_goes_with_its_part_of_the_tables(gone: int, jobs: Any, tmp_path: Path) -> None:
    """One that keeps its own keys and values, and one that reads those of another."""
    settings = [f"budget.drop_layers=[{gone}]", "budget.sparsity=null"]
    job, dense = load_job(jobs["shards"], settings), jobs["shards"].parent / "dense"
    report = run_job(job, tmp_path / "run", quiet)
    name = "model.embed_tokens_per_layer.weight"
    table = load_file(dense / "model.safetensors")[name].unflatten(1, (6, -1))
    stays = [layer for layer in range(6) if layer != gone]
    network, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/model", output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(network.state_dict()[name], table[:, stays].flatten(1))
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["num_kv_shared_layers"] == (2 if gone == 0 else 1)
    assert report.parameters.after == open_checkpoint(tmp_path / "run/model").parameters


@pytest.mark.parametrize("kind", [KIND, "gemma4_text"])
def test_layers_of_different_sizes_are_surveyed_and_padded(
    kind: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Each layer's own groups are looked at; FFNs that are twice as wide lose twice as many
    channels.
    """
    job = make_job(make_model(kind, **MORE_LAYERS))
    run_job(load_job(job, PADDED), tmp_path / "run", quiet)
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    layers = plan["shapes"][0]["layers"]
    assert len({kept["neurons"] for kept in layers}) > 1
    assert all(
        kept.get("wide_neurons", 2 * kept["neurons"]) == 2 * kept["neurons"] for kept in layers
    )
    if kind == KIND:
        assert min(kept["neurons"] for kept in layers[4:]) < 48
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["budget.drop_layers=[2]", "budget.sparsity=null"], "others read its keys and values"),
        (["method.scale=gradients"], "layers read what others have left"),
        (["method=dress", "method.scope=layer"], "trained by itself"),
        (["recover.scope=layer"], "trained by itself"),
        (
            [
                "budget.per_layer=true",
                "export.pad=true",
                "budget.allocation=threshold",
                "method=numerical",
            ],
            "FFNs of two widths",
        ),
    ],
)
def test_what_takes_layers_by_themselves_is_refused(
    settings: list[str], says: str, jobs: Any
) -> None:
    job = load_job(jobs["shards"], settings)
    with pytest.raises(SpecError, match=says):
        plan_job(job, planned_checkpoint(Path(job.model.path)))


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_text-inputs"])
def test_gradients_go_back_through_layers_with_heads_of_two_kinds(
    kind: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = load_job(make_job(make_model(kind, **MORE_LAYERS), method={"scale": "gradients"}))
    run_job(job, tmp_path / "run", quiet)
    squares = load_file(tmp_path / "run/tasks/gradients/gradients.safetensors")
    found = {name: (tensor != 0).any(1).tolist() for name, tensor in squares.items()}
    assert found["heads"] == [True, False] * 3
    assert found["full_heads"] == [False, True] * 3
    assert found["neurons"] == [True] * 6


@pytest.mark.parametrize(("kind", "site"), [("gemma4_text", "qkv"), (KIND, "up")])
def test_zeros_in_matrices_that_differ_between_layers_are_refused(
    kind: str, site: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    method = {"name": "sparse", "sites": [site]}
    given = yaml.safe_load(make_job(make_model(kind, **MORE_LAYERS), method=method).read_text())
    job = load_job({name: section for name, section in given.items() if name != "budget"})
    with pytest.raises(SpecError, match=f"method.sites: {site}: not all layers"):
        plan_job(job, planned_checkpoint(Path(job.model.path)))


def test_inputs_and_what_is_left_for_later_take_memory(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    """Hidden states, the output of a block, an input, and of two layers keys and values."""
    checkpoint = open_checkpoint(make_model(KIND, **MORE_LAYERS))
    plan = make_plan(load_job(make_job(checkpoint.path)), checkpoint)
    waits = plan.needs.memory_by_step["collect"]["hidden states"]
    groups, sizes = 2, 8 + 32
    assert waits == 16 * 64 * 4 * (2 * 32 + 12 + 2 * groups * sizes)


def test_tables_count_once(make_model: MakeModel, make_job: MakeJob) -> None:
    checkpoint = open_checkpoint(make_model(KIND, **MORE_LAYERS))
    job, dense = load_job(make_job(checkpoint.path)), checkpoint.model.units
    whole = footprint(checkpoint, [dense] * 6, job)
    assert whole.parameters == checkpoint.parameters
    assert whole.decoder_parameters == checkpoint.decoder_parameters
    without = footprint(checkpoint, [dense] * 5, job, there=range(1, 6))
    assert without.parameters == checkpoint.planned_layers(range(1, 6)).parameters


def test_keys_and_values_that_nothing_reads_stay_behind(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """As in published files."""
    folder = make_model(KIND, **MORE_LAYERS)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.5.self_attn.k_proj.weight"
    save_file(tensors | {name: torch.ones(8, 8)}, folder / "model.safetensors", {"format": "pt"})
    told: list[dict[str, Any]] = []
    run_job(load_job(make_job(folder)), tmp_path / "run", told.append)
    assert [e for e in told if "1 tensors of layers that read keys and values of others" in str(e)]
    assert name not in open_checkpoint(tmp_path / "run/model").tensors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size_per_layer_input": 0}, "not supported without hidden_size_per_layer_input"),
        ({"num_kv_shared_layers": 6}, "leaves no layer of some kind"),
        ({"num_kv_shared_layers": 5}, "leaves no layer of some kind"),
        ({"enable_moe_block": True}, "use_double_wide_mlp is not supported with enable_moe_block"),
    ],
)
def test_what_its_class_fails_on_is_refused(
    changes: dict[str, Any], says: str, make_model: MakeModel
) -> None:
    folder = make_model(KIND, **MORE_LAYERS)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(folder)
