"""Mixtures of experts through whole jobs: right values in closed form, what is told, refused, and
done again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.planning.preflight import check_inputs
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint, planned_checkpoint
from rayprune.workers.network.building import whole_model
from rayprune.workers.network.experts import Experts, Routing
from rayprune.workers.network.streamed import hooked
from rayprune.workers.store.layout import CALIBRATION_TASK, TOKENS_FILE, Scope
from tests.conftest import MakeJob, MakeModel, edit_json, folder_bytes
from tests.contracts.test_experts import without
from tests.helpers import mixtures, quiet, some

ALL_HEADS = {"kv_groups": 2}
LAYERS = "layers-allocated"


def ran(job: Path, out: Path, *changes: str) -> Report:
    return run_job(load_job(job, list(changes)), out, quiet)


def stored(run: Path, name: str) -> Tensor:
    """A tensor of the pruned model, in fp64."""
    index = json.loads((run / "model/model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(run / "model" / index[name], framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    return tensor.double()


@torch.inference_mode()
def first_routing(model: Path, run: Path) -> tuple[Experts, Routing]:
    """The experts of the dense model's first layer, and what calibration gives them."""
    network = whole_model(open_checkpoint(model)).eval()
    experts: Any = network.get_submodule("model.layers.0.mlp.experts")
    with safe_open(Scope(run).folder(CALIBRATION_TASK) / TOKENS_FILE, framework="pt") as handle:
        tokens_ST = handle.get_tensor("tokens")
    noted: list[Any] = []
    with hooked([experts.register_forward_pre_hook(lambda _, args: noted.append(args))]):
        network(input_ids=tokens_ST, use_cache=False)
    return experts, Routing(*noted[0], numbers=experts.numbers)


def test_experts_go_by_reap_and_widths_are_corrected_by_weighted_least_squares(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model, run = make_model("qwen3_moe"), tmp_path / "run"
    job = make_job(
        model, budget={**ALL_HEADS, "experts": 4, "sparsity": 0.2}, correction={"damping": 1e-9}
    )
    report = ran(job, run)
    experts, routing = first_routing(model, run)
    manifest = json.loads((run / "tasks/layer-0000/manifest.json").read_text())
    for number, expert in enumerate(experts):
        tokens_n, weights_n = routing.of(number)
        group = report.layers[0].groups[f"neurons.{number}"]
        assert group.tokens == len(tokens_n) > 2 * group.of
        kept = manifest["info"]["kept"][f"neurons.{number}"]
        with torch.inference_mode():
            z_nF = (expert.inner(routing.hidden_TD[tokens_n]) * weights_n[:, None]).double()
        weight_DF = expert.down_proj.weight.double()
        exact_DK = torch.linalg.lstsq(z_nF[:, kept], z_nF @ weight_DF.T).solution.T
        found_DK = stored(run, f"model.layers.0.mlp.experts.{number}.down_proj.weight")
        assert float((found_DK - exact_DK).norm() / exact_DK.norm()) < 1e-4
    fewer = ran(job, tmp_path / "fewer", "budget.experts=3", "budget.sparsity=0.24")
    chosen = fewer.layers[0].groups["experts"]
    for number, expert in enumerate(experts):
        tokens_n, shares_n = routing.with_shares().of(number)
        with torch.inference_mode():
            norms_n = expert(routing.hidden_TD[tokens_n]).norm(dim=1) * shares_n
        assert (chosen.scores or ())[number] == pytest.approx(float(norms_n.mean()), rel=1e-5)
        assert (chosen.tokens_by_expert or ())[number] == len(tokens_n)
    lost = min(range(4), key=(chosen.scores or ()).__getitem__)
    assert chosen.units == tuple(sorted({0, 1, 2, 3} - {lost}))
    changed = ["budget.experts=3", "budget.sparsity=0.24", "budget.expert_score=frequency"]
    frequent = ran(job, tmp_path / "frequent", *changed)
    ran(job, tmp_path / "fewer", *changed)  # what has changed is done again
    assert folder_bytes(tmp_path / "fewer/model") == folder_bytes(tmp_path / "frequent/model")
    counted = frequent.layers[0].groups["experts"]
    assert counted.scores == tuple(map(float, counted.tokens_by_expert or ()))


def test_experts_that_saw_few_tokens_are_told_and_cut_plainly(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model, run = make_model("qwen3_moe"), tmp_path / "run"
    job = make_job(
        model,
        budget={**ALL_HEADS, "sparsity": 0.2},
        calibration={"samples": 2, "sequence_length": 8, "shards": 2},
    )
    checkpoint = open_checkpoint(model)
    plan = make_plan(load_job(job), checkpoint)
    assert plan.tokens_per_neuron == pytest.approx(16 * 2 / 4 / 48, abs=0.2)
    assert "per FFN channel" in plan.warnings[0]
    report = ran(job, run)
    groups = [
        group
        for layer in report.layers
        for name, group in layer.groups.items()
        if name.startswith("neurons.")
    ]
    assert len(groups) == 12
    assert any(f"{len(groups)} of 12 experts saw fewer than 10" in w for w in report.warnings)
    assert "<h2>Experts</h2>" in report.page.read_text()
    unseen = [group for group in groups if group.tokens == 0 or group.held_out_error == 0]
    assert all(group.damping == 1e6 for group in unseen)
    manifest = json.loads((run / "tasks/layer-0000/manifest.json").read_text())
    for number in range(4):
        if report.layers[0].groups[f"neurons.{number}"].damping == 1e6:
            name = f"model.layers.0.mlp.experts.{number}.down_proj.weight"
            with safe_open(model / "model.safetensors", framework="pt") as handle:
                plain_DK = handle.get_tensor(name)[:, manifest["info"]["kept"][f"neurons.{number}"]]
            assert torch.allclose(stored(run, name), plain_DK.double(), atol=1e-5)


def test_a_plan_counts_what_a_token_passes_through(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    checkpoint = open_checkpoint(make_model("mixtral"))
    budget = {**ALL_HEADS, "experts": 3, "sparsity": 0.2}
    plan = make_plan(load_job(make_job(checkpoint.path, budget=budget)), checkpoint)
    shape = plan.shape
    assert shape.kept == {"heads": 2, "experts": 3, "neurons": 48}
    expert, attention = 3 * 32 * 48, 2 * 32 * 32 + 2 * 32 * 16
    layer = 3 * expert + attention + 3 * 32 + 2 * 32
    assert shape.decoder_parameters == 3 * layer
    head = 2 * 260 * 32
    assert shape.flops_per_token == head + 3 * 2 * (2 * expert + attention + 3 * 32)
    assert plan.model.active_parameters < plan.model.parameters


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"budget": {"experts": 1}}, "choice needs at least 2, so give a number from 2 to 4"),
        ({"budget": {"experts": 5}}, "from 2 to 4"),
        ({"parallel": {"placement": "layers"}}, "parallel.placement: set it to shards"),
        ({"budget": {"per_layer": True}, "export": {"pad": True}}, "export.pad: leave it out"),
        ({"recover": {"epochs": 1}}, "recover: leave it out"),
        ({"method": {"name": "stat", "scale": "gradients"}}, "method.scale"),
    ],
)
def test_what_is_not_done_with_experts_is_refused(
    sections: dict[str, Any], says: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    checkpoint = open_checkpoint(make_model("mixtral"))
    job = load_job(make_job(checkpoint.path, **sections))
    with pytest.raises(SpecError, match=says):
        make_plan(job, checkpoint)


def test_a_model_without_experts_has_none_to_keep(make_model: MakeModel, make_job: MakeJob) -> None:
    checkpoint = open_checkpoint(make_model("llama"))
    with pytest.raises(SpecError, match="no experts of model_type llama"):
        make_plan(load_job(make_job(checkpoint.path, budget={"experts": 2})), checkpoint)


def test_resumed_from_any_layer_it_has_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, force_memory: Any
) -> None:
    """The pruned path is taken up behind layers that are read back from packed files; what is kept
    where changes nothing. The probe chooses the KV groups.
    """
    job = make_job(make_model("gpt_oss"), budget={"experts": 3, "sparsity": 0.4})
    ran(job, tmp_path / "run")
    expected = folder_bytes(tmp_path / "run" / "model")
    for left in (1, 2):
        run = tmp_path / f"resumed-{left}"
        shutil.copytree(tmp_path / "run", run)
        shutil.rmtree(run / "cache", ignore_errors=True)
        shutil.rmtree(run / "model")
        for layer in range(left, 3):
            shutil.rmtree(run / f"tasks/layer-{layer:04d}")
        ran(job, run)
        assert folder_bytes(run / "model") == expected
    force_memory(keep_inputs=False, spill_hidden=True, spill_statistics=True)
    ran(job, tmp_path / "in-files")
    assert folder_bytes(tmp_path / "in-files" / "model") == expected


CURVES: dict[str, Any] = {
    "per_layer": True,
    "sparsity": 0.3,
    "allocation": {"name": "curves", "levels": 6, "samples": 2},
}


def done(run: Path, task: str) -> Any:
    """What the manifest of a task tells."""
    return json.loads((run / f"tasks/{task}/manifest.json").read_text())["info"]


@pytest.mark.parametrize("model_type", some(mixtures(), "qwen3_moe", "deepseek_v3"))
def test_experts_widths_and_heads_compete_for_one_budget(
    model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """In every layer, with dense FFNs and shared experts; as many go from each part of the
    experts, and a shared expert of several follows the others.
    """
    model, run = make_model(model_type), tmp_path / "run"
    told: list[Any] = []
    job = load_job(make_job(model, budget=CURVES))
    if reason := open_checkpoint(model).model.sized_alike:
        with pytest.raises(SpecError, match=f"per_layer: {reason}; set it to false"):
            run_job(job, run, quiet)
        return
    report = run_job(job, run, lambda e: told.append(e) if e["event"] == LAYERS else None)
    checkpoint, sizes = open_checkpoint(model), report.decoder_parameters
    (layers,) = (event["layers"] for event in told)
    groups = {group.name: group for group in checkpoint.model.groups}
    experts = groups["experts"]
    for kept in layers:
        assert kept["experts"] >= experts.fewest
        assert kept["experts"] % experts.parts == 0
        assert kept["neurons"] % 8 == 0 or kept["neurons"] == groups["neurons"].num_units
        assert kept == checkpoint.model.followed(kept)
        assert min(kept.values()) > 0
    step = 8 * sum(g.count * g.unit_parameters for g in groups.values() if g.kind == "ffn")
    assert 0 <= 0.7 * sizes.before - sizes.after < step
    alone = done(run, "sensitivity")["result"]
    in_layers = [group for layer in checkpoint.model.layers for group in layer.groups]
    assert len(alone) == sum(not (group.times or group.fixed) for group in in_layers)
    assert all(value > 0 for value in alone)
    assert report.allocation is not None
    assert report.allocation["predicted_divergence"] > 0


def test_what_experts_cost_is_the_divergence_of_a_model_without_them(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """The dense one whose router never chooses those that go. A run that was cut off goes on
    behind the last layer that was looked at.
    """
    model, run = make_model("qwen3_moe"), tmp_path / "run"
    budget = CURVES | {"kv_groups": 2}
    job = make_job(model, budget=budget, calibration={"samples": 8, "shards": 8})
    ran(job, run)
    checkpoint = open_checkpoint(model)
    with safe_open(run / "tasks/survey-0001/cuts-experts.safetensors", "pt") as handle:
        kept = handle.get_tensor("experts.2.units").tolist()  # of 4, as much as stays of all
    tokens_ST = load_file(Scope(run).folder(CALIBRATION_TASK) / TOKENS_FILE)["tokens"][[0, 4]]
    network = whole_model(checkpoint).eval()
    with torch.inference_mode():
        logits = [network(input_ids=tokens_ST, use_cache=False).logits]
        with without(network, checkpoint, {1: kept}) as fewer:
            logits.append(fewer(input_ids=tokens_ST, use_cache=False).logits)
    dense, cut = (torch.log_softmax(found.double(), -1) for found in logits)
    expected = float((dense.exp() * (dense - cut)).sum(-1).mean())
    assert done(run, "sensitivity")["result"][2] == pytest.approx(expected, rel=1e-3)
    expected_bytes = folder_bytes(run / "model")
    for task in ("survey-0001", "survey-0002", "sensitivity", "shape", "export"):
        shutil.rmtree(run / "tasks" / task, ignore_errors=True)
    shutil.rmtree(run / "cache", ignore_errors=True)
    shutil.rmtree(run / "model")
    ran(job, run)
    assert folder_bytes(run / "model") == expected_bytes


@pytest.mark.slow
def test_a_search_over_experts_is_never_worse_than_curves(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    allocation = {"name": "search", "generations": 2, "offspring": 4, "levels": 4, "samples": 2}
    budget = CURVES | {"allocation": allocation}
    report = ran(make_job(make_model("qwen2_moe"), budget=budget), tmp_path / "run")
    assert report.allocation is not None
    first = done(tmp_path / "run", "generation-0000")["result"]["parent_divergence"]
    assert report.allocation["divergence"] <= first


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("budget", [{"experts": 3, "sparsity": 0.35}, CURVES])
def test_ray_writes_the_same_bytes(
    budget: dict[str, Any], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model("qwen2_moe"), budget=budget)
    ran(job, tmp_path / "in-process")
    ran(job, tmp_path / "ray", "cluster.executor=ray", "parallel.workers=2")
    assert folder_bytes(tmp_path / "ray" / "model") == folder_bytes(tmp_path / "in-process/model")


def test_a_quantised_mixture_is_planned_with_all_its_experts(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    """It can be planned, not pruned; its experts become narrower, none of them goes."""
    folder = make_model("mixtral")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    plan = make_plan(load_job(make_job(folder)), planned_checkpoint(folder))
    (shape,) = plan.shapes
    assert shape.kept["experts"] == plan.model.units["experts"]
    assert shape.kept["neurons"] < plan.model.units["neurons"]


def test_layers_that_guess_further_tokens_are_left_out_and_told(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    folder = make_model("deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    guess = {"model.layers.3.eh_proj.weight": torch.ones(4, 4)}
    save_file(tensors | guess, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.left_out == tuple(guess)
    assert not guess.keys() & checkpoint.tensors.keys()
    warnings = check_inputs(load_job(make_job(folder)), checkpoint)
    assert any("1 tensors of multi-token prediction are left out" in w for w in warnings)
    config = checkpoint.planned_cut(checkpoint.model.units, "transformers", "auto").config
    assert config.raw["num_nextn_predict_layers"] == 0
    assert not open_checkpoint(make_model("gpt_oss", "packed")).left_out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_group": 3}, "8 experts do not form 3 groups"),
        ({"n_group": 8}, "its router needs 16 experts to choose 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads"),
    ],
)
def test_configs_that_compute_something_else_are_refused(
    changes: dict[str, Any], says: str, make_model: MakeModel
) -> None:
    folder = make_model("deepseek_v3")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(folder)


def test_as_many_experts_stay_in_each_group_as_its_choice_needs(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    checkpoint = open_checkpoint(make_model("deepseek_v3"))
    for experts, says in {2: "from 4 to 8", 5: "give a multiple of 2"}.items():
        job = load_job(make_job(checkpoint.path, budget={"experts": experts}))
        with pytest.raises(SpecError, match=says):
            make_plan(job, checkpoint)
