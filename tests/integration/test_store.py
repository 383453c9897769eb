"""A store: what one run has finished another one finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.run_folder import read_events
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages.reads import kind_of
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet
from tests.models import build_model

JOBS: dict[str, dict[str, Any]] = {
    "pruned path": {"method": {"scale": "gradients"}},
    "dense path": {"parallel": {"placement": "layers"}, "method": {"scale": "gradients"}},
    "rows": {"parallel": {"placement": "layers"}, "method": {"factorization": "qr"}},
    "refit": {"parallel": {"placement": "layers", "propagation": "refit"}},
    "curves": {
        "parallel": {"placement": "layers"},
        "budget": {"per_layer": True, "allocation": {"name": "curves", "samples": 2, "levels": 4}},
    },
}
FOUND = {"calibration-tokens", "evaluation-tokens", "outer", "evaluate-before"}
FOUND_BESIDES: dict[str, set[str]] = {
    "pruned path": {"gradients", "probed"},
    "dense path": {"gradients", "probed", "statistics"},
    "rows": {"probed", "statistics"},
    "refit": {"probed", "statistics"},
    "curves": {"statistics"},
}
PASSES = {"flow", "gradients", "collect", "probe"}
"""Steps of a worker that run the calibration text through layers."""


@pytest.fixture
def job(
    request: pytest.FixtureRequest, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> JobSpec:
    """One of JOBS, with an evaluation."""
    build_model(tmp_path / "dense")
    (tmp_path / "held_out.txt").write_text(text_file.read_text()[40_000:44_000])
    evaluation = {"path": str(tmp_path / "held_out.txt"), "window": 32, "max_windows": 4}
    parts = {"evaluation": evaluation} | JOBS[request.param]
    return load_job(make_job(tmp_path / "dense", **parts))


def another(job: JobSpec) -> JobSpec:
    """With another sparsity."""
    return job.model_copy(update={"budget": job.budget.model_copy(update={"sparsity": 0.4})})


def of_events(run: Path, event: str) -> list[str]:
    """Kinds of tasks by event."""
    return [kind_of(found["task"]) for found in read_events(run) if found["event"] == event]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, indirect=True)
def test_another_sparsity_finds_what_does_not_depend_on_it(
    job: JobSpec, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = request.node.callspec.params["job"]
    store = tmp_path / "store"
    first = run_job(job, tmp_path / "first", quiet, store=store)
    second = run_job(another(job), tmp_path / "second", quiet, store=store)
    plain = [
        run_job(one, tmp_path / f"plain-{number}", quiet)
        for number, one in enumerate((job, another(job)))
    ]
    for number, (run, report) in enumerate((("first", first), ("second", second))):
        alone = tmp_path / f"plain-{number}"
        assert folder_bytes(tmp_path / run / "model") == folder_bytes(alone / "model")
        assert report.perplexity == plain[number].perplexity
    assert set(of_events(tmp_path / "second", "task-fetched")) >= FOUND | FOUND_BESIDES[name]
    assert not set(of_events(tmp_path / "second", "task-done")) & (FOUND | FOUND_BESIDES[name])
    passes = PASSES & second.step_seconds.keys()
    assert passes == ({"collect"} if name in ("pruned path", "refit") else set())
    assert main(["verify", str(tmp_path / "second")]) == 0


@pytest.mark.parametrize("job", ["dense path"], indirect=True)
def test_the_same_job_elsewhere_only_puts_the_model_together(job: JobSpec, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run_job(job, tmp_path / name, quiet, store=tmp_path / "store")
    assert set(of_events(tmp_path / "second", "task-done")) == {"source", "export"}
    assert folder_bytes(tmp_path / "first" / "model") == folder_bytes(tmp_path / "second" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dense path"], indirect=True)
def test_a_damaged_entry_is_ignored_and_made_anew(job: JobSpec, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_job(job, tmp_path / "first", quiet, store=store)
    for file in store.rglob("statistics.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 255
        file.unlink()
        file.write_bytes(data)
    for manifest in store.rglob("manifest.json"):
        if json.loads(manifest.read_text())["task"] == "layer-0001":
            manifest.unlink()
            manifest.write_text("{")
    run_job(another(job), tmp_path / "second", quiet, store=store)
    assert of_events(tmp_path / "second", "task-done").count("statistics") == 3
    run_job(another(job), tmp_path / "plain", quiet)
    assert folder_bytes(tmp_path / "second" / "model") == folder_bytes(tmp_path / "plain" / "model")
    run_job(job, tmp_path / "third", quiet, store=store)
    assert of_events(tmp_path / "third", "task-done").count("layer") == 1
    assert "statistics" in of_events(tmp_path / "third", "task-fetched")
    assert folder_bytes(tmp_path / "third" / "model") == folder_bytes(tmp_path / "first" / "model")
    assert not [path for path in store.rglob(".*.tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dense path"], indirect=True)
def test_another_model_of_the_same_shape_finds_nothing_of_it(
    job: JobSpec, make_model: MakeModel, tmp_path: Path
) -> None:
    run_job(job, tmp_path / "first", quiet, store=tmp_path / "store")
    other = make_model(name="other", seed=1)
    model = job.model.model_copy(update={"path": str(other)})
    run_job(
        job.model_copy(update={"model": model}),
        tmp_path / "second",
        quiet,
        store=tmp_path / "store",
    )
    found = set(of_events(tmp_path / "second", "task-fetched"))
    assert found == {"calibration-tokens", "evaluation-tokens"}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dense path"], indirect=True)
def test_statistics_of_another_job_in_the_folder_are_not_taken(
    job: JobSpec, make_job: MakeJob, tmp_path: Path
) -> None:
    run_job(job, tmp_path / "run", quiet, store=tmp_path / "store")
    text = job.calibration.model_copy(update={"samples": 12})
    changed = job.model_copy(update={"calibration": text})
    run_job(changed, tmp_path / "run", quiet)  # without the store
    run_job(changed, tmp_path / "fresh", quiet)
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(tmp_path / "fresh" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["dense path"], indirect=True)
def test_many_workers_share_a_store(job: JobSpec, tmp_path: Path, ray_session: None) -> None:
    many = job.model_copy(
        update={
            "cluster": job.cluster.model_copy(update={"executor": "ray"}),
            "parallel": job.parallel.model_copy(update={"workers": 2}),
        }
    )
    for name, one in (("first", many), ("second", another(many))):
        report = run_job(one, tmp_path / name, quiet, store=tmp_path / "store")
    assert not PASSES & report.step_seconds.keys()
    run_job(another(job), tmp_path / "plain", quiet)
    assert folder_bytes(tmp_path / "second" / "model") == folder_bytes(tmp_path / "plain" / "model")
