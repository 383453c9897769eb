"""Whole layers that go without training: the right ones, as if they had never been there, and what
is pruned after them as if it had been pruned of the shorter model.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.planning.together import relative_sparsity
from rayprune.orchestrator.reporting.plan_view import plan_parts
from rayprune.orchestrator.reporting.report import Report, layer_table, summary
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.layout import TOKENS, TOKENS_FILE
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

SMALL = {"samples": 4, "sequence_length": 32, "shards": 2}
LAYERS = 5


def ran(job: Path, out: Path, *changes: str, **options: Any) -> Report:
    return run_job(load_job(job, list(changes)), out, options.get("show", quiet))


def planned(job: Path, model: Path, *changes: str) -> Plan:
    return plan_job(load_job(job, list(changes)), open_checkpoint(model))


def weights(model: Path) -> dict[str, bytes]:
    return {n: data for n, data in folder_bytes(model).items() if n.endswith(".safetensors")}


def without(network: Any, gone: list[int]) -> Any:
    """The stock network without some of its layers."""
    stay = [layer for number, layer in enumerate(network.model.layers) if number not in gone]
    network.model.layers = nn.ModuleList(stay)
    return network


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def log_probabilities(network: Any, windows_ST: Tensor) -> Tensor:
    logits: Tensor = network(input_ids=windows_ST, use_cache=False).logits
    return logits.double().log_softmax(-1)


@torch.inference_mode()
def test_layers_go_by_block_influence_or_one_after_the_other_by_divergence(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Both in closed form, from the stock model; what is left is that model without them."""
    model = make_model(num_hidden_layers=LAYERS)
    budget: dict[str, Any] = {"drop_layers": 2, "sparsity": None, "drop_samples": 4}
    job = make_job(model, budget=budget, calibration=SMALL)
    by_influence = ran(job, tmp_path / "influence")
    tokens = tmp_path / "influence/tasks/calibration-tokens" / TOKENS_FILE
    windows_ST = load_file(tokens)[TOKENS]
    network = loaded(model)
    states = network(input_ids=windows_ST, use_cache=False, output_hidden_states=True)
    behind: list[Tensor] = []
    hook = network.model.layers[-1].register_forward_hook(lambda _, args, out: behind.append(out))
    network(input_ids=windows_ST, use_cache=False)
    hook.remove()
    hidden = [*states.hidden_states[:-1], behind[0]]  # the last one stands behind the norm
    exact = [
        float((1 - torch.cosine_similarity(x.double(), y.double(), -1)).mean())
        for x, y in itertools.pairwise(hidden)
    ]
    found = by_influence.dropped or {}
    assert found["influence"] == pytest.approx(exact, rel=1e-5)
    assert found["layers"] == sorted(sorted(range(LAYERS), key=exact.__getitem__)[:2])
    assert f"layers left out: {found['layers'][0]}, {found['layers'][1]}, by block" in "\n".join(
        part for part in summary(by_influence) if isinstance(part, str)
    )
    dense = log_probabilities(network, windows_ST)
    gone: list[int] = []
    for _ in range(2):
        distance = {
            layer: float(
                (dense.exp() * (dense - log_probabilities(shorter, windows_ST))).sum(-1).mean()
            )
            for layer in range(LAYERS)
            if layer not in gone
            for shorter in [without(loaded(model), [*gone, layer])]
        }
        gone.append(min(distance, key=distance.__getitem__))
    by_divergence = ran(job, tmp_path / "divergence", "budget.drop_score=divergence").dropped or {}
    assert by_divergence["order"] == gone
    assert by_divergence["divergence"][-1] == pytest.approx(distance[gone[-1]], rel=1e-4)
    left = log_probabilities(loaded(tmp_path / "divergence/model"), windows_ST)
    assert torch.equal(left, log_probabilities(without(loaded(model), gone), windows_ST))
    assert not (tmp_path / "divergence/tasks/layers").exists()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_what_goes_after_layers_goes_as_from_the_model_without_them(
    model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """One job gives the bytes of two: layers first, then widths by what is left of the budget."""
    model = make_model(model_type, num_hidden_layers=LAYERS)
    heads = {"kv_groups": 2}
    evaluated = {"path": str(load_job(make_job(model)).calibration.path), "window": 16}
    job = make_job(
        model,
        calibration=SMALL,
        budget={"drop_layers": [3, 1], "sparsity": 0.5, "round_to": 8, **heads},
        evaluation={**evaluated, "path": str(other_text(tmp_path)), "max_windows": 2},
    )
    both = ran(job, tmp_path / "both")
    alone = make_job(model, "alone.yaml", budget={"drop_layers": [1, 3], "sparsity": None})
    shorter = ran(alone, tmp_path / "alone")
    assert folder_bytes(tmp_path / "alone/model").keys() == folder_bytes(
        tmp_path / "both/tasks/layers/export"
    ).keys() | {"README.md"}
    dense = open_checkpoint(model).decoder_parameters
    assert shorter.decoder_parameters.after * LAYERS == dense * 3
    rest = relative_sparsity(0.5, dense, shorter.decoder_parameters.after)
    second = make_job(
        tmp_path / "alone/model",
        "second.yaml",
        calibration=SMALL,
        budget={"sparsity": rest, "round_to": 8, **heads},
    )
    ran(second, tmp_path / "second")
    assert weights(tmp_path / "both/model") == weights(tmp_path / "second/model")
    assert both.decoder_parameters.ratio <= 0.5
    assert both.decoder_parameters.before == dense
    plan = planned(job, model)
    assert plan.shapes[0].decoder_parameters == both.decoder_parameters.after
    assert [bool(layer.groups) for layer in both.layers] == [True, False, True, False, True]
    assert "layers 1, 3 go whole" in "\n".join(p for p in plan_parts(plan) if isinstance(p, str))
    tasks = json.loads((tmp_path / "both/plan.json").read_text())["tasks"]
    assert set(plan.tasks) <= {*tasks, "shape"}
    if both.perplexity:
        assert both.perplexity.before != both.perplexity.after


def other_text(folder: Path) -> Path:
    path = folder / "other.txt"
    path.write_text("Whole layers go; what is left of a model is another model. " * 20)
    return path


def test_a_run_that_was_cut_off_goes_on_and_a_changed_choice_is_done_again(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(
        make_model(num_hidden_layers=LAYERS),
        calibration=SMALL,
        budget={"drop_layers": 1, "sparsity": 0.4, "drop_score": "divergence", "drop_samples": 2},
    )
    ran(job, tmp_path / "whole")
    ends = ("dropped-0000", "layers/layer-0002", "layers/export", "layer-0001")
    for task in ends:

        def stop(event: dict[str, Any], task: str = task) -> None:
            done = event["event"] in ("task-done", "step-finished", "stage-finished")
            if done and (tmp_path / "cut/tasks" / task / "manifest.json").exists():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ran(job, tmp_path / "cut", show=stop)
    ran(job, tmp_path / "cut")
    assert (
        folder_bytes(tmp_path / "cut/model").keys() == folder_bytes(tmp_path / "whole/model").keys()
    )
    assert weights(tmp_path / "cut/model") == weights(tmp_path / "whole/model")
    changed = ["budget.drop_layers=[0]", "budget.drop_score=influence", "budget.drop_samples=8"]
    ran(job, tmp_path / "cut", *changed)
    ran(job, tmp_path / "new", *changed)
    assert weights(tmp_path / "cut/model") == weights(tmp_path / "new/model")
    none = ["budget.drop_layers=null", "budget.drop_score=influence", "budget.drop_samples=8"]
    ran(job, tmp_path / "cut", *none)
    assert verify_run(tmp_path / "cut")


@pytest.mark.usefixtures("drawn")
def test_the_page_says_which_layers_are_left_out(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model(num_hidden_layers=LAYERS), calibration=SMALL)
    for number, budget in enumerate(({}, {"sparsity": 0.4, "kv_groups": 2})):
        words = [f"budget={json.dumps(budget | {'drop_layers': [1], 'round_to': 4})}"]
        report = ran(job, tmp_path / str(number), *words)
        page = report.page.read_text()
        assert "layers left out: 1" in page
        assert "Nothing was pruned" not in page
        rows = [row for row in layer_table(report).rows if row[0] == "1"]
        assert [row[1] for row in rows] == ["left out"]
        assert any("overfit" in each for each in report.warnings) == bool(budget)
    assert " 0 to " in page, "the drawing shows it as gone"


def test_a_plan_of_fewer_layers_is_told_beside_the_dense_model(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model(num_hidden_layers=LAYERS)
    job = make_job(model, calibration=SMALL, budget={"drop_layers": [1], "sparsity": 0.4})
    spread = planned(job, model, "budget.per_layer=true")
    assert "together 60.00% of the decoder" in (spread.sizes or "")
    alike = planned(job, model, "budget.kv_groups=2", "budget.round_to=16")
    removed = 1 - alike.shapes[0].decoder_parameters / open_checkpoint(model).decoder_parameters
    assert removed > 0.41
    assert "more than the 40.00% asked for" in (alike.sizes or "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["budget.drop_layers=5"], "5 of 5 layers; at most 4"),
        (["budget.drop_layers=[1,7]"], "there is no layer 7"),
        (["budget.drop_layers=[1,1]"], "names a layer twice"),
        (["budget.drop_layers=[1]", "budget.drop_score=divergence"], "need drop_layers: how many"),
        (["budget.drop_layers=1", "method=progressive"], "has a way of its own"),
        (["budget.drop_layers=1", "method=trsp"], "has a way of its own"),
        (["budget.drop_layers=3", "budget.kv_groups=1"], "nothing is left to do for budget.kv_gr"),
        (["budget.drop_layers=3", "budget.sparsity=null", "budget.kv_groups=1"], "without a targe"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: list[str], words: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model(num_hidden_layers=LAYERS)
    job = make_job(model, calibration=SMALL, budget={"sparsity": 0.4})
    with pytest.raises(SpecError, match=words):
        planned(job, model, *changes)


def test_text_of_its_own_is_planned_once_and_as_the_original_writes_it(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model(num_hidden_layers=LAYERS)
    job = make_job(model, calibration=SMALL | {"own": {"tokens": 4096, "length": 64}})
    usual = planned(job, model)
    for changes in (
        ["budget.drop_layers=[2]", "budget.sparsity=null"],
        ["budget.drop_layers=[2]", "budget.sparsity=0.5"],
    ):
        plan = planned(job, model, *changes)
        written = [stage.flops for stage in plan.stages if stage.name == "own text"]
        assert written == [stage.flops for stage in usual.stages if stage.name == "own text"]
        steps = plan.needs.memory_by_step
        assert steps["own text"] == usual.needs.memory_by_step["own text"]
        assert plan.needs.worker_memory_bytes >= sum(steps["own text"].values())


def test_the_teacher_is_planned_as_the_original(make_model: MakeModel, make_job: MakeJob) -> None:
    """Also where what is pruned has fewer layers by then."""
    model = make_model(num_hidden_layers=LAYERS)
    job = make_job(model, calibration=SMALL, recover={"batch": 1})
    held = {}
    for loss in ("distillation", "lm"):
        changes = ["budget.drop_layers=[1, 2]", "budget.sparsity=0.6", f"recover.loss={loss}"]
        held[loss] = planned(job, model, *changes).needs.memory_by_step["train"]["weights"]
    assert held["distillation"] - held["lm"] == 4 * open_checkpoint(model).parameters
