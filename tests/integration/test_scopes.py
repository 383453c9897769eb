"""Two passes over a model in one run folder, and a folder whose model is another one now."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayprune.orchestrator.execution.run_folder import RunFolder
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.reporting.gather import write_report
from rayprune.orchestrator.run import make_executor, prune, run_job
from rayprune.orchestrator.stages import start
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Pruned
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import Scope
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet, some
from tests.models import build_model

PLACEMENTS = [
    {"placement": "shards"},
    {"placement": "layers"},
    {"placement": "layers", "propagation": "refit"},
]


def two_passes(job: JobSpec, out: Path, show: Any = quiet) -> list[Pruned]:
    """Prune the model, and in a scope of its own what came of it."""
    model, done = Path(job.model.path), list[Pruned]()
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, job))
        plan = make_plan(job, open_checkpoint(model))
        plan = replace(plan, memory=replace(plan.memory, layers_per_chunk=1))
        executor = stack.enter_context(make_executor(job, folder.path, lambda _: plan.memory))
        context = Context(job, folder, executor, show, Scope(folder.path))
        start.start(context, model)
        for name in ("", "step-02"):
            checkpoint = done[-1].pruned.checkpoint if done else open_checkpoint(model)
            scoped = replace(context, scope=Scope(folder.path, name))
            plan = replace(make_plan(job, checkpoint), memory=plan.memory)
            done.append(prune(scoped, plan, checkpoint))
        write_report(context, done[0])
    return done


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PLACEMENTS, ids=str)
def test_two_passes_do_not_see_each_other_and_go_on_after_a_stop(
    parallel: dict[str, Any], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    parts = {"memory": {"checkpoint_layers": 1}, "parallel": parallel, "budget": {"kv_groups": 2}}
    job = load_job(make_job(make_model(num_hidden_layers=4), **parts))
    first, second = two_passes(job, tmp_path / "calm")
    assert second.dense.path == first.pruned.path
    expected = [folder_bytes(done.pruned.path) for done in (first, second)]
    verify_run(tmp_path / "calm")

    # as two runs would: a folder for each
    run_job(job, tmp_path / "one", quiet)
    alone = job.model_copy(
        update={"model": job.model.model_copy(update={"path": str(tmp_path / "one" / "model")})}
    )
    run_job(alone, tmp_path / "two", quiet)
    found = [folder_bytes(tmp_path / name / "model") for name in ("one", "two")]
    for pass_, run in zip(expected, found, strict=True):  # a card names the folder that was pruned
        assert pass_.keys() | {"README.md"} == run.keys()
        assert all(run[name] == pass_[name] for name in pass_.keys() - {"README.md"})

    seen: list[str] = []

    def cut_off(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("layer") == 2:
            seen.append(event["stage"])
            if seen.count("sweep") == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        two_passes(job, tmp_path / "cut", cut_off)
    again: list[dict[str, Any]] = []
    done = two_passes(job, tmp_path / "cut", again.append)
    assert [folder_bytes(one.pruned.path) for one in done] == expected
    assert not [event for event in again if event["event"] == "task-stale"]
    assert [e["layer"] for e in again if e["event"] == "step-finished" and "layer" in e] == [3]


def change_values(model: Path, layer: int) -> None:
    """Other values in one layer, under the same names and of the same size."""
    tensors = load_file(model / "model.safetensors")
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    tensors[name] = tensors[name] + 0.1 * torch.ones_like(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("parallel", some(PLACEMENTS, PLACEMENTS[0]), ids=str)
def test_a_model_whose_values_change_is_another_model(
    parallel: dict[str, Any], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model(num_hidden_layers=4)
    job = load_job(make_job(model, parallel=parallel, budget={"kv_groups": 1}))

    def cut_off(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("layer") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "run", cut_off)
    identity = open_checkpoint(model).identity
    change_values(model, 2)
    assert open_checkpoint(model).identity == identity, "names and sizes are as they were"
    again: list[dict[str, Any]] = []
    run_job(job, tmp_path / "run", again.append)
    run_job(job, tmp_path / "fresh", quiet)
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(tmp_path / "fresh" / "model")
    stale = {event["task"] for event in again if event["event"] == "task-stale"}
    assert "source" in stale
    assert stale & {f"layer-{n:04d}" for n in range(4)} <= {"layer-0002", "layer-0003"}


def test_a_model_that_is_only_written_again_is_the_same(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model()
    job = load_job(make_job(model))
    run_job(job, tmp_path / "run", quiet)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data)
    again: list[dict[str, Any]] = []
    run_job(job, tmp_path / "run", again.append)
    assert [event["task"] for event in again if event["event"] == "task-stale"] == ["source"]


def test_a_digest_sees_values_and_not_the_files_they_lie_in(
    make_job: MakeJob, tmp_path: Path
) -> None:
    digests = []
    for seed in (0, 0, 1):
        model = build_model(tmp_path / f"model-{len(digests)}", seed=seed)
        run = tmp_path / f"run-{len(digests)}"
        run_job(load_job(make_job(model)), run, quiet)
        manifest = read_manifest(Scope(run).folder("source"))
        assert manifest is not None
        digests.append(manifest.info["result"])
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


@pytest.mark.slow
def test_everything_that_is_computed_says_on_what(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "held_out.txt").write_text(text_file.read_text()[40_000:44_000])
    search = {"name": "search", "samples": 2, "levels": 4, "generations": 1, "offspring": 2}
    job = load_job(
        make_job(
            make_model(),
            budget={"per_layer": True, "allocation": search},
            method={"scale": "gradients"},
            evaluation={"path": str(tmp_path / "held_out.txt"), "window": 32},
        )
    )
    run_job(job, tmp_path / "run", quiet)
    for path in (tmp_path / "run" / "tasks").iterdir():
        manifest = read_manifest(path)
        assert manifest is not None
        without = {"source", "calibration-tokens", "evaluation-tokens", "outer"}
        expected = None if path.name in without else "cpu in float32"
        assert manifest.info.get("computed_on") == manifest.made_from["computed_on"] == expected
