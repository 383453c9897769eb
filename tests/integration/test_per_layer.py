"""Layers that differ in size: exported as remote code or padded, from an allocation given by hand
or found.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.shapes import Shape, uneven_shape
from rayprune.orchestrator.reporting.report import summary
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages import probe
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.reads import options_read
from rayprune.orchestrator.stages.subject import Subject
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import (
    LAYER_FILE,
    SENSITIVITY_TASK,
    SHAPE_TASK,
    generation_task,
    layer_task,
    task_folder,
)
from tests.conftest import MakeJob, MakeModel
from tests.helpers import families, normalised, quiet, some

BY_HAND = [
    {"heads": 0, "neurons": 40},
    {"heads": 1, "neurons": 48},
    {"heads": 2, "neurons": 0},
    {"heads": 1, "neurons": 20},
]
TOKENS = torch.tensor([[3, 77, 15, 200, 9, 31, 8, 120]])


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocate as BY_HAND says, but for groups that have to stay."""

    def allocated(context: Context, subject: Subject) -> Shape:
        checkpoint = subject.model.checkpoint
        fixed = {group.name: group.num_units for group in checkpoint.model.groups if group.fixed}
        return uneven_shape(context.job, checkpoint, [kept | fixed for kept in BY_HAND])

    monkeypatch.setattr(probe, "allocate", allocated)


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


@torch.inference_mode()
def streamed_logits(folder: Path) -> torch.Tensor:
    """As this package computes them itself, layer by layer, without the folder's code."""
    model = StreamedModel(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    batch = model.embed(TOKENS)
    for index in range(model.checkpoint.num_layers):
        args, kwargs = batch.arguments[index]
        batch.hidden_BTD = model.load_layer(index)(batch.hidden_BTD, *args, **kwargs)
    return model.logits(TOKENS, batch.hidden_BTD)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("model_type", some(families(), "gemma2"))
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_remote_code_padded_and_own_models_agree(
    drift: float, model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    if drift and model_type in normalised():
        pytest.skip("its blocks' outputs are normalised before they are added")
    dense = make_model(model_type, num_hidden_layers=4)
    if reason := open_checkpoint(dense).model.sized_alike:
        with pytest.raises(SpecError, match=f"{reason}; set export.pad: true"):
            run_job(load_job(make_job(dense, budget={"per_layer": True})), tmp_path / "run", quiet)
        return
    folders = {}
    for pad in (False, True):
        sections = {
            "budget": {"per_layer": True},
            "export": {"pad": pad},
            "correction": {"drift": drift},
        }
        run_job(load_job(make_job(dense, **sections)), tmp_path / f"pad-{pad}", quiet)
        folders[pad] = tmp_path / f"pad-{pad}" / "model"
    own_code = AutoModelForCausalLM.from_pretrained(folders[False], trust_remote_code=True)
    padded = AutoModelForCausalLM.from_pretrained(folders[True])
    expected = logits_of(own_code)
    torch.testing.assert_close(logits_of(padded), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed_logits(folders[False]), expected, rtol=1e-4, atol=1e-5)
    assert not list(folders[True].glob("*.py"))
    (code,) = folders[False].glob("*.py")
    assert len(code.read_text().splitlines()) <= 40
    stored = sum(parameter.numel() for parameter in own_code.parameters())
    assert stored == open_checkpoint(folders[False]).parameters


@pytest.mark.slow
@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("model_type", "window"), [("qwen3", {}), ("gemma2", {"sliding_window": 8})]
)
def test_generation_with_the_cache_equals_generation_without(
    model_type: str,
    window: dict[str, int],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
) -> None:
    dense = make_model(model_type, num_hidden_layers=4, **window)
    run_job(load_job(make_job(dense, budget={"per_layer": True})), tmp_path / "run", quiet)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", trust_remote_code=True
    ).eval()
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(TOKENS, use_cache=True, **options),
        model.generate(TOKENS, use_cache=False, **options),
    )


def test_a_cache_that_could_not_count_is_refused(make_model: MakeModel, make_job: MakeJob) -> None:
    dense, kept = make_model("gemma2", num_hidden_layers=4), {"heads": 2, "neurons": 40}
    spread = [kept | {"heads": 0}, kept, kept | {"heads": 0}, kept]  # all sliding windows go
    with pytest.raises(
        SpecError, match=r"no layer of sliding_attention would keep its attention; set export\.pad"
    ):
        uneven_shape(
            load_job(make_job(dense, budget={"per_layer": True})), open_checkpoint(dense), spread
        )
    uneven_shape(
        load_job(make_job(dense, budget={"per_layer": True}, export={"pad": True})),
        open_checkpoint(dense),
        spread,
    )


@pytest.mark.usefixtures("by_hand")
def test_neither_stock_classes_nor_a_second_run_take_layers_of_different_sizes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(num_hidden_layers=4)
    run_job(load_job(make_job(dense, budget={"per_layer": True})), tmp_path / "run", quiet)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=False)
    again = load_job(make_job(tmp_path / "run" / "model"))
    with pytest.raises(ModelError, match="layers differ in size"):
        run_job(again, tmp_path / "again", quiet)


CURVES = {"per_layer": True, "allocation": {"name": "curves", "levels": 6, "samples": 2}}


@pytest.mark.parametrize("propagation", some(["pruned", "dense", "refit"], "dense"))
def test_curves_meet_the_budget_to_one_step(
    propagation: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(num_hidden_layers=4)
    placement = "shards" if propagation == "pruned" else "layers"
    parallel = {"workers": 1, "micro_batch": 2, "placement": placement, "propagation": propagation}
    report = run_job(
        load_job(make_job(dense, budget=CURVES, parallel=parallel)), tmp_path / "run", quiet
    )
    sizes = report.decoder_parameters
    assert 0 <= 0.75 * sizes.before - sizes.after < 4 * 3 * 32  # four channels
    assert len({str(layer.groups) for layer in report.layers}) > 1
    verify_run(tmp_path / "run")
    before = load_file(dense / "model.safetensors")
    for layer in range(4):
        folder = task_folder(tmp_path / "run", layer_task(layer))
        done: Any = read_manifest(folder)
        up, after = f"model.layers.{layer}.mlp.up_proj.weight", load_file(folder / LAYER_FILE)
        rows = before[up][done.info["kept"].get("neurons", slice(None))]
        assert torch.equal(after[up], rows) if len(rows) else up not in after, layer


SEARCH = {
    "per_layer": True,
    "allocation": {"name": "search", "generations": 3, "offspring": 3, "samples": 2, "levels": 4},
}


@pytest.mark.slow
def test_search_is_never_worse_than_curves_and_goes_on_where_it_was_cut_off(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = load_job(make_job(make_model(num_hidden_layers=3), budget=SEARCH))
    run_job(job, tmp_path / "run", quiet)
    generations = [
        read_manifest(task_folder(tmp_path / "run", generation_task(number))) for number in range(3)
    ]
    history = [manifest.info["result"]["divergence"] for manifest in generations if manifest]  # type: ignore[index]
    first: Any = generations[0].info["result"] if generations[0] else None
    assert history == sorted(history, reverse=True)
    assert history[0] <= first["parent_divergence"]

    def cut_off(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("generation") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "cut", cut_off)
    run_job(job, tmp_path / "cut", quiet)
    for file in (tmp_path / "run" / "model").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "cut" / "model" / file.name).read_bytes()


@pytest.mark.parametrize("method", some(["numerical", "flap"], "numerical"))
def test_one_threshold_for_all_layers(
    method: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    budget = {"per_layer": True, "allocation": "threshold"}
    job = load_job(
        make_job(make_model(num_hidden_layers=3), budget=budget, method={"name": method})
    )
    sizes = run_job(job, tmp_path / "run", quiet).decoder_parameters
    assert 0 <= 0.75 * sizes.before - sizes.after < 4 * 3 * 32


def test_the_sensitivity_of_a_layer_is_the_divergence_of_a_model_cut_there_alone(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(num_hidden_layers=3)
    job = load_job(
        make_job(
            dense,
            budget={
                "per_layer": True,
                "kv_groups": 2,
                "allocation": {"name": "curves", "samples": 2},
            },
        )
    )
    run_job(job, tmp_path / "run", quiet)
    measured: Any = read_manifest(task_folder(tmp_path / "run", SENSITIVITY_TASK))
    assert len(measured.info["result"]) == 3
    assert all(value > 0 for value in measured.info["result"])
    assert read_manifest(task_folder(tmp_path / "run", SHAPE_TASK)) is not None


def test_heads_whose_scores_are_multiplied_by_their_cost_stay(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """A KV group has 16 times a channel's parameters: with times-cost no group scores less than a
    channel.
    """
    budget, kept = {"per_layer": True, "allocation": "threshold"}, list[int]()

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "layers-allocated":
            kept.extend(layer["heads"] for layer in event["layers"])

    method = {"name": "numerical", "head_score": "times-cost"}
    job = make_job(make_model(num_hidden_layers=2), budget=budget, method=method)
    run_job(load_job(job), tmp_path / "run", listen)
    assert kept == [2, 2]


def test_of_several_texts_each_is_measured_by_itself(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """And the worst of them is what counts, if it is asked for."""
    other = tmp_path / "other.txt"
    other.write_text("One, two, three: 0123456789. " * 200)
    calibration = {"mix": [{"path": str(other), "weight": 3}]}
    allocation = SEARCH["allocation"] | {"generations": 1, "objective": "max"}
    budget = SEARCH | {"allocation": allocation, "kv_groups": 2}
    job = load_job(
        make_job(make_model(num_hidden_layers=2), budget=budget, calibration=calibration)
    )
    report = run_job(job, tmp_path / "run", quiet)
    alone: Any = read_manifest(task_folder(tmp_path / "run", SENSITIVITY_TASK))
    assert all(len(by_text) == 2 and by_text[0] != by_text[1] for by_text in alone.info["result"])
    done: Any = read_manifest(task_folder(tmp_path / "run", generation_task(0)))
    best = done.info["result"]
    assert best["divergence"] == max(best["by_text"])
    assert report.allocation is not None
    named = dict(zip(("text.txt", "other.txt"), best["by_text"], strict=True))
    assert report.allocation["divergence_by_text"] == named
    assert report.allocation["predicted_by_text"].keys() == named.keys()
    said = [part for part in summary(report) if isinstance(part, str)]
    assert any(part.startswith("divergence by text: text.txt ") for part in said)


def test_an_objective_over_one_text_is_no_option_of_any_task(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    """So that runs of one text go on, whatever it says."""
    model, budget = make_model(), CURVES | {"allocation": {"name": "curves", "objective": "max"}}
    job = load_job(make_job(model, budget=budget))
    options: Any = options_read(job, SHAPE_TASK)
    assert "objective" not in options["bounds"]["allocation"]
    assert options_read(job, SENSITIVITY_TASK)["divergence_windows"] == 4
    mix = {"mix": [{"path": "other"}]}
    several: Any = options_read(
        load_job(make_job(model, budget=budget, calibration=mix)), generation_task(0)
    )
    assert several["bounds"]["allocation"]["objective"] == "max"
    assert several["divergence_windows"] == [2, 2]
