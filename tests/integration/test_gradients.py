"""Runs whose activations are scaled by gradients."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages import gradients
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import read_manifest
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

GRADIENTS = ["method.scale=gradients"]


def kept(run: Path) -> list[Any]:
    manifests = [read_manifest(folder) for folder in sorted((run / "tasks").glob("layer-*"))]
    return [manifest.info["kept"] for manifest in manifests if manifest]


@pytest.mark.slow
def test_they_are_measured_once_and_change_what_stays(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model(), budget={"kv_groups": 1})
    run_job(load_job(job), tmp_path / "weights", quiet)
    run_job(load_job(job, GRADIENTS), tmp_path / "run", quiet)
    assert kept(tmp_path / "run") != kept(tmp_path / "weights")
    expected = folder_bytes(tmp_path / "run" / "model")
    for folder in (*(tmp_path / "run" / "tasks").glob("layer-*"), tmp_path / "run" / "model"):
        shutil.rmtree(folder)
    (tmp_path / "run" / "report.json").unlink()
    events: list[dict[str, Any]] = []
    run_job(load_job(job, GRADIENTS), tmp_path / "run", events.append)
    assert {"gradients"} <= {event["task"] for event in events if event["event"] == "task-found"}
    assert folder_bytes(tmp_path / "run" / "model") == expected


def test_the_file_holds_a_row_for_every_layer(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """More windows asked for than there are: all are taken."""
    job = make_job(
        make_model(num_hidden_layers=4), budget={"kv_groups": 1}, parallel={"placement": "layers"}
    )
    run_job(load_job(job, [*GRADIENTS, "method.gradient_samples=1000"]), tmp_path / "run", quiet)
    scales = load_file(tmp_path / "run" / "tasks" / "gradients" / "gradients.safetensors")
    assert {name: tuple(scale.shape) for name, scale in scales.items()} == {
        "heads": (4, 32),
        "neurons": (4, 48),
    }
    assert all(bool((scale > 0).all()) for scale in scales.values())


@pytest.mark.slow
def test_rounds_give_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(make_job(make_model(), budget={"kv_groups": 1}), GRADIENTS)
    run_job(job, tmp_path / "together", quiet)
    monkeypatch.setattr(gradients, "GRADIENT_WINDOWS_AT_ONCE", 3)
    events: list[dict[str, Any]] = []
    run_job(job, tmp_path / "rounds", events.append)
    steps = [
        event["windows"]
        for event in events
        if event["event"] == "step-finished" and event["stage"] == "gradients"
    ]
    assert steps == [3, 3, 3, 3, 3, 1]
    assert folder_bytes(tmp_path / "rounds" / "model") == folder_bytes(
        tmp_path / "together" / "model"
    )
