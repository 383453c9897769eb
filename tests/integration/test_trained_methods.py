"""DReSS, TRSP and recovery from job file to model, in one process."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, ResourceError, SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import MANIFEST_NAME, read_manifest
from rayprune.workers.store.layout import regularised_task, selection_task, task_folder
from rayprune.workers.store.training_stage import read_log
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet, some

TRAINING = {"epochs": 1, "batch": 4, "learning_rate": 1e-3, "checkpoint_steps": 2}


@pytest.mark.parametrize("mask", some(["random", "stat"], "random"))
def test_dress_trains_with_a_penalty_on_its_mask_and_cuts_exactly_that(
    mask: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    method = {"name": "dress", "mask": mask, "training": TRAINING | {"epochs": 4}}
    evaluation = {"path": str(tmp_path / "other.txt"), "window": 16}
    (tmp_path / "other.txt").write_text(
        "Nothing of this stands in the text that was trained on, nowhere at all. " * 8
    )
    job = load_job(
        make_job(make_model(), method=method, budget={"kv_groups": 1}, evaluation=evaluation)
    )
    report = run_job(job, tmp_path / "run", quiet)
    log = read_log(task_folder(tmp_path / "run", "regularise"))
    assert log[-1]["penalty"] < log[0]["penalty"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    trained = AutoModelForCausalLM.from_pretrained(
        task_folder(tmp_path / "run", "regularise") / "model"
    )
    for layer in range(3):
        selection = read_manifest(task_folder(tmp_path / "run", selection_task(layer)))
        assert selection is not None
        kept: Any = selection.info["result"]
        assert torch.equal(
            model.model.layers[layer].mlp.up_proj.weight,
            trained.model.layers[layer].mlp.up_proj.weight[kept["neurons"]],
        )
    assert report.perplexity
    assert report.perplexity.before != report.perplexity.after
    verify_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # without masks and with them
def test_dress_trains_every_layer_alone(
    model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    training = TRAINING | {"epochs": 6, "learning_rate": 3e-3, "samples": 10, "micro_batch": 3}
    method = {"name": "dress", "scope": "layer", "strength": 0.5, "training": training}
    dense = make_model(model_type)
    job = make_job(dense, method=method, budget={"kv_groups": 1})
    report = run_job(load_job(job), tmp_path / "run", quiet)
    trained = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "tasks" / "regularise" / "model"
    )
    original = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(trained.model.embed_tokens.weight, original.model.embed_tokens.weight)
    for layer in range(3):
        log = read_log(task_folder(tmp_path / "run", regularised_task(layer)))
        assert len(log) == 15
        assert log[0]["transfer"] < 1e-9
        assert log[-1]["penalty"] < log[0]["penalty"]
        assert log[-1]["transfer"] < 0.5
        selection = read_manifest(task_folder(tmp_path / "run", selection_task(layer)))
        assert selection is not None
        kept: Any = selection.info["result"]
        ratio = trained.model.layers[layer].mlp.up_proj.weight.norm(dim=1) / original.model.layers[
            layer
        ].mlp.up_proj.weight.norm(dim=1)
        gone = sorted(set(range(len(ratio))) - set(kept["neurons"]))
        assert ratio[gone].mean() < ratio[kept["neurons"]].mean()
    assert report.training["layers"].steps == tuple(range(15))
    assert set(report.training["layers"].curves) == {"transfer", "penalty", "gradient_norm"}
    verify_run(tmp_path / "run")

    calls = 0

    def cut_off(event: dict[str, Any]) -> None:
        nonlocal calls
        calls += event["event"] == "step-finished" and event["stage"] == "regularise"
        if calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(job), tmp_path / "cut", cut_off)
    run_job(load_job(job), tmp_path / "cut", quiet)
    assert folder_bytes(tmp_path / "cut" / "model") == folder_bytes(tmp_path / "run" / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        *((name, {"name": "trsp"}) for name in ("bloom", "mpt", "gpt_neo", "gpt2")),
        *((name, {"name": "dress", "scope": "layer"}) for name in ("falcon", "gpt_neo", "opt")),
    ],
)
def test_layers_of_every_build_are_trained(
    model_type: str,
    method: dict[str, Any],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
) -> None:
    """Layers that return tuples, and an FFN that is no module; BLOOM and MPT lose whole layers."""
    dense = make_model(model_type, num_hidden_layers=4)
    gates = {"gates": TRAINING} if method["name"] == "trsp" else {}
    job = make_job(dense, method={**method, "training": TRAINING, **gates})
    report = run_job(load_job(job), tmp_path / "run", quiet)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sum(p.numel() for p in network.parameters()) == report.parameters.after
    assert report.decoder_parameters.after <= 0.75 * report.decoder_parameters.before


@pytest.mark.parametrize("transfer", some(["shrink", "penalty"]))
def test_trsp_removes_the_layers_that_its_gates_choose(
    transfer: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    method = {
        "name": "trsp",
        "transfer": transfer,
        "gates": TRAINING,
        "training": TRAINING,
        "protect_first": 1,
    }
    dense = make_model("smollm3", num_hidden_layers=6)
    events: list[dict[str, Any]] = []
    report = run_job(
        load_job(make_job(dense, method=method, budget={"sparsity": 0.3})),
        tmp_path / "run",
        events.append,
    )
    chosen = [event["layer"] for event in events if event["event"] == "layer-chosen"]
    assert len(set(chosen)) == 2
    steps = [
        (event["task"], event["step"] + 1 == event["of"])
        for event in events
        if event["event"] == "training-step"
    ]
    assert {("gates-0000", True), ("gates-0001", True), ("updates", True)} <= set(steps)
    assert 0 not in chosen
    assert {name: len(training.steps) for name, training in report.training.items()} == {
        "gates": 8,
        "updates": 4,
    }
    assert report.decoder_parameters.after == report.decoder_parameters.before * 4 // 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    trained = AutoModelForCausalLM.from_pretrained(
        task_folder(tmp_path / "run", "updates") / "model"
    )
    assert model.config.num_hidden_layers == 4
    stay = [layer for layer in range(6) if layer not in chosen]
    assert model.config.no_rope_layers == [trained.config.no_rope_layers[layer] for layer in stay]
    for position, layer in enumerate(stay):
        expected = trained.model.layers[layer].state_dict()
        assert all(
            torch.equal(tensor, expected[name])
            for name, tensor in model.model.layers[position].state_dict().items()
        )
    verify_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "lm"},
        {"loss": "distillation"},
        {"lora": {"rank": 4}, "learning_rate": 1e-2, "dtype": "bfloat16"},
    ],
)
def test_recovery_trains_the_pruned_model(
    options: dict[str, Any],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert (
        main(
            [
                "run",
                str(make_job(make_model(), recover=TRAINING | {"epochs": 3} | options)),
                "--out",
                str(run),
            ]
        )
        == 0
    )
    folder = task_folder(run, "recover")
    assert (
        f"\nmodel: {folder / 'model'}, not recovered: {run / 'model'}, report:"
        in capsys.readouterr().out
    )
    log = read_log(folder)
    losses = [line["loss"] for line in log]
    assert sum(losses[-4:]) < sum(losses[:4])  # the last epoch and the first
    pruned, recovered = (
        AutoModelForCausalLM.from_pretrained(path) for path in (run / "model", folder / "model")
    )
    assert not torch.equal(
        pruned.model.layers[0].mlp.up_proj.weight, recovered.model.layers[0].mlp.up_proj.weight
    )
    verify_run(run)


@pytest.mark.slow
def test_recovery_may_be_added_and_changed_afterwards(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, pruned = make_job(make_model()), tmp_path / "run" / "model"
    run_job(load_job(job), tmp_path / "run", quiet)
    before = folder_bytes(pruned)
    losses, options = [], "loss: lm, batch: 4, checkpoint_steps: 2"
    for rate in (1e-3, 1e-5):
        run_job(
            load_job(job, [f"recover={{{options}, learning_rate: {rate}}}"]),
            tmp_path / "run",
            quiet,
        )
        losses.append([line["loss"] for line in read_log(task_folder(tmp_path / "run", "recover"))])
    assert folder_bytes(pruned) == before
    assert len(losses[0]) == len(losses[1]) == 4
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] < losses[1][-1]


@pytest.mark.slow
def test_a_recovery_that_cannot_be_repeated_keeps_the_one_before(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, run = make_job(make_model(), recover=TRAINING), tmp_path / "run"
    run_job(load_job(job), run, quiet)
    before = folder_bytes(task_folder(run, "recover"))
    with pytest.raises(SpecError, match="too short"):
        run_job(load_job(job, ["recover.samples=80000"]), run, quiet)
    # the same training
    run_job(load_job(job, ["recover.micro_batch=2", "recover.checkpoint_steps=1"]), run, quiet)
    assert folder_bytes(task_folder(run, "recover")) == before
    wild = "{batch: 1, learning_rate: 10, warmup: 0, schedule: constant, clip: 1.0e+9, epochs: 4}"
    with pytest.raises(ModelError, match=r"lower learning_rate"):
        run_job(load_job(job, [f"recover={wild}"]), run, quiet)
    assert not (task_folder(run, "recover") / MANIFEST_NAME).exists()
    assert not (run / "report.json").exists()


@pytest.mark.slow
def test_a_run_that_was_cut_off_in_training_ends_with_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    method = {"name": "trsp", "gates": TRAINING, "training": TRAINING}
    job = load_job(make_job(make_model(num_hidden_layers=4), method=method, recover=TRAINING))
    run_job(job, tmp_path / "calm", quiet)
    for task in ("gates-0000", "updates", "recover"):

        def cut_off(event: dict[str, Any], task: str = task) -> None:
            if event["event"] == "trained" and event["task"] == task:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_job(job, tmp_path / "cut", cut_off)
    run_job(job, tmp_path / "cut", quiet)
    for folder in ("model", "tasks/recover/model"):
        assert folder_bytes(tmp_path / "cut" / folder) == folder_bytes(tmp_path / "calm" / folder)


def test_a_training_that_does_not_fit_is_refused_before_it_starts(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = load_job(make_job(make_model(), recover=TRAINING, memory={"worker": "321MiB"}))
    with pytest.raises(ResourceError, match=r"memory\.worker: a worker needs at least"):
        run_job(job, tmp_path / "run", quiet)


def test_a_missing_package_is_found_out_before_anything_is_done(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    job = load_job(make_job(make_model(), recover=TRAINING | {"lora": {"rank": 4}}))
    with pytest.raises(
        ResourceError, match=r"peft.*; install rayprune with its extra: pip install 'ray"
    ):
        run_job(job, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["recover", "method"])
def test_a_model_is_not_judged_by_text_it_was_trained_on(
    section: str, make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text(text_file.read_text()[20_000:24_000])
    more = TRAINING | {"samples": 400}
    sections = (
        {"recover": more}
        if section == "recover"
        else {"method": {"name": "trsp", "gates": more, "training": TRAINING}}
    )
    job = load_job(
        make_job(
            make_model(), evaluation={"path": str(tmp_path / "other.txt"), "window": 64}, **sections
        )
    )
    with pytest.raises(
        SpecError, match="of its tokens stand in the windows for calibration or training too"
    ):
        run_job(job, tmp_path / "run", quiet)


def test_a_text_too_short_for_a_training_is_found_out_at_once(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = load_job(make_job(make_model(), recover=TRAINING | {"samples": 80_000}))
    with pytest.raises(SpecError, match="too short"):
        run_job(job, tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "model").exists()


def test_what_a_trained_method_cannot_do_is_refused(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    for sections, message in (
        ({"method": {"name": "trsp"}, "budget": {"kv_groups": 1}}, "removes whole layers"),
        (
            {"method": {"name": "dress"}, "budget": {"per_layer": True}},
            r"leaves out budget\.per_layer",
        ),
    ):
        with pytest.raises(SpecError, match=message):
            load_job(make_job(make_model(), **sections))
