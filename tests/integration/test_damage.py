"""What is read again is what was written: damaged, foreign and changed things between two attempts,
and during one.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, SpecError, VerificationError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.training.loop import Training
from tests.conftest import edit_json, flip_bit, folder_bytes, write_job
from tests.helpers import quiet, some
from tests.models import build_model

CACHED: dict[str, dict[str, Any]] = {
    "pruned path": {"memory": {"checkpoint_layers": 1}},
    "drift": {"memory": {"checkpoint_layers": 1}, "correction": {"drift": 0.5}},
    "dense path": {"parallel": {"placement": "layers", "workers": 1, "micro_batch": 4}},
}


def is_step(event: dict[str, Any], stage: str, layer: int) -> bool:
    found = [event.get(name) for name in ("event", "stage", "layer")]
    return found == ["step-finished", stage, layer]


def swap(files: list[Path]) -> None:
    """Give every file the content of another one."""
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(content)


DAMAGES: dict[str, Callable[[list[Path]], object]] = {
    "a bit": lambda files: [flip_bit(file) for file in files],
    "truncated": lambda files: [os.truncate(file, file.stat().st_size // 2) for file in files],
    "empty": lambda files: [os.truncate(file, 0) for file in files],
    "swapped": swap,
    "unsealed": lambda files: [save_file(load_file(file), file) for file in files],
}


@pytest.fixture(scope="module", params=some(CACHED, "pruned path", "dense path"))
def interrupted(
    request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobSpec, Path, dict[str, bytes]]:
    """A job, the folder of a run that was stopped behind its second layer, and the bytes of the
    model that comes of it undisturbed.
    """
    folder = tmp_path_factory.mktemp("damage")
    model = build_model(folder / "dense", num_hidden_layers=3)
    sections = CACHED[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayprune.orchestrator.stages.stream.waves", one_layer_a_wave)
        job = load_job(write_job(folder / "job.yaml", text_file, model, **sections))
        run_job(job, folder / "calm", quiet)

        def stop(event: dict[str, Any]) -> None:
            if is_step(event, "sweep", 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_job(job, folder / "run", stop)
    return job, folder / "run", folder_bytes(folder / "calm" / "model")


def one_layer_a_wave(layers: range, *_: int) -> list[list[range]]:
    return [[range(layer, layer + 1)] for layer in layers]


@pytest.mark.parametrize("kind", some(DAMAGES, "swapped"))
def test_damaged_hidden_states_are_computed_again(
    kind: str, interrupted: tuple[JobSpec, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    job, run, expected = interrupted
    shutil.copytree(run, tmp_path / "run")
    files = sorted((tmp_path / "run" / "cache").rglob("*.safetensors"))
    assert len(files) > 2
    DAMAGES[kind](files)
    seen: list[dict[str, Any]] = []
    run_job(job, tmp_path / "run", seen.append)
    told = [event["text"] for event in seen if event["event"] == "warning"]
    assert any("is damaged or not of this run" in text and "/cache/" in text for text in told)
    assert folder_bytes(tmp_path / "run" / "model") == expected


def test_whole_hidden_states_are_used(
    interrupted: tuple[JobSpec, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    job, run, expected = interrupted
    shutil.copytree(run, tmp_path / "run")
    seen: list[dict[str, Any]] = []
    run_job(job, tmp_path / "run", seen.append)
    assert not [e for e in seen if e["event"] == "warning" and "damaged" in e["text"]]
    assert folder_bytes(tmp_path / "run" / "model") == expected


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobSpec, Path]:
    """A job over two layers and the folder of its run."""
    folder = tmp_path_factory.mktemp("finished")
    model = build_model(folder / "dense", num_hidden_layers=2)
    job = load_job(write_job(folder / "job.yaml", text_file, model))
    run_job(job, folder / "run", quiet)
    return job, folder / "run"


@pytest.fixture
def run(finished: tuple[JobSpec, Path], tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


EDITED: dict[str, tuple[str, dict[str, Any]]] = {
    "other units": ("layer-0000", {"info": {"groups": {}, "kept": {}, "consumers": {}}}),
    "other windows": ("calibration-tokens", {"info": {"shape": [1, 1]}}),
    "no files": ("layer-0001", {"files": {}}),
    "no values": ("source", {"info": {"result": ["", "", ""]}}),
}


@pytest.mark.parametrize("kind", EDITED)
def test_an_edited_record_is_made_anew(
    kind: str, finished: tuple[JobSpec, Path], run: Path
) -> None:
    task, changes = EDITED[kind]
    edit_json(run / "tasks" / task / "manifest.json", **changes)
    seen: list[dict[str, Any]] = []
    run_job(finished[0], run, seen.append)
    assert [event["task"] for event in seen if event["event"] == "task-damaged"] == [task]
    for folder in ("model", f"tasks/{task}"):
        assert folder_bytes(run / folder) == folder_bytes(finished[1] / folder)


def test_odd_lines_of_logs_leave_the_report_alone(
    finished: tuple[JobSpec, Path], run: Path
) -> None:
    (run / "report.json").unlink()
    with (run / "events.jsonl").open("ab") as handle:
        handle.write(b'[]\n{"event": "stage-started"}\n\xff\x00\n{"event": 3, "time": NaN}\n{"to')
    report = run_job(finished[0], run, quiet)
    assert min(report.seconds.values()) >= 0


def test_a_clock_that_runs_backwards_gives_no_negative_seconds(
    finished: tuple[JobSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9, 0, -(10**4)))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    report = run_job(finished[0], tmp_path / "run", quiet)
    assert all(0 <= value < 1e3 for value in report.seconds.values())


PARTS = (
    "model",
    "tasks",
    "tasks/layer-0000",
    "report.json",
    "events.jsonl",
    "run.lock",
    "job.yaml",
)


@pytest.mark.parametrize("part", PARTS)
def test_links_in_a_run_folder_are_not_followed(
    part: str, finished: tuple[JobSpec, Path], run: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (run / part).rename(outside)
    (run / part).symlink_to(outside)
    before = folder_bytes(tmp_path)
    with pytest.raises(SpecError, match=f"{part}: is a link to .*; a run folder holds none"):
        run_job(finished[0], run, quiet)
    with pytest.raises(VerificationError):
        verify_run(run)
    assert folder_bytes(tmp_path) == before


def test_what_dead_attempts_have_left_is_removed(finished: tuple[JobSpec, Path], run: Path) -> None:
    left = run / "tasks" / "layer-0000" / f".layer.safetensors.{'0f' * 16}.tmp"
    left.write_text("half")
    run_job(finished[0], run, quiet)
    assert not left.exists()


# the model


@pytest.fixture
def model(text_file: Path, tmp_path: Path) -> JobSpec:
    """A job over a model of its own."""
    build_model(tmp_path / "dense", num_hidden_layers=3)
    return load_job(write_job(tmp_path / "job.yaml", text_file, tmp_path / "dense"))


def change_last_layer(model: Path) -> None:
    """Other values under the same names and sizes, and the same time of writing."""
    file = model / "model.safetensors"
    times, tensors = file.stat(), load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("stage", "layer", "task"),
    [
        pytest.param("probe", 0, "shape", marks=pytest.mark.slow),
        ("sweep", 0, "layer-0000"),
        pytest.param("sweep", 2, "layer-0002", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_changes_during_a_run_stops_it(
    stage: str, layer: int, task: str, model: JobSpec, tmp_path: Path
) -> None:
    def change(event: dict[str, Any]) -> None:
        if is_step(event, stage, layer):
            change_last_layer(tmp_path / "dense")

    with pytest.raises(VerificationError, match=r"model\.safetensors: was changed while this run"):
        run_job(model, tmp_path / "run", change)
    assert not (tmp_path / "run" / "tasks" / task).exists()
    run_job(model, tmp_path / "run", quiet)
    run_job(model, tmp_path / "fresh", quiet)
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(tmp_path / "fresh" / "model")


def test_files_that_are_touched_but_hold_the_same_do_not_stop_a_run(
    model: JobSpec, tmp_path: Path
) -> None:
    def touch(event: dict[str, Any]) -> None:
        if is_step(event, "sweep", 0):
            os.link(tmp_path / "dense" / "model.safetensors", tmp_path / "another name")
            (tmp_path / "dense" / "config.json").touch()

    run_job(model, tmp_path / "run", touch)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "config.json"])
def test_links_out_of_a_model_folder_bring_nothing_in(
    name: str, model: JobSpec, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    if (tmp_path / "dense" / name).exists():
        (tmp_path / "dense" / name).rename(secret)
    else:
        secret.write_text("key")
    (tmp_path / "dense" / name).symlink_to(secret)
    with pytest.raises(ModelError, match=f"{name}: links to .*secret, outside the model folder"):
        run_job(model, tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "model").exists()


def test_names_of_others_cannot_steer_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "a\x1b[2J\x9b31m\u202eb.yaml"
    job.write_text("model: {path: '/\\e]0;x'}\ncalibration: {path: /c}\n\"\\e[1mx\": 3\n")
    assert main(["validate", str(job)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") >= 1
    assert all(letter.isprintable() or letter == "\n" for letter in shown.err + shown.out)


# trainings

TRAINED = {"epochs": 1, "batch": 4, "learning_rate": 1e-3, "checkpoint_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_damaged_training_state_is_not_gone_on_from(
    scope: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = build_model(tmp_path / "dense", num_hidden_layers=1)
    method = {"name": "dress", "scope": scope, "training": TRAINED}
    job = load_job(write_job(tmp_path / "job.yaml", text_file, dense, method=method))
    run_job(job, tmp_path / "calm", quiet)
    whole = Training._step

    def dies(self: Training, step: int, numbers: Any) -> dict[str, float]:
        if step == 2:
            raise KeyboardInterrupt
        return whole(self, step, numbers)

    monkeypatch.setattr(Training, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "run", quiet)
    monkeypatch.setattr(Training, "_step", whole)
    (state,) = (tmp_path / "run" / "tasks").rglob("step-*/*")
    assert state.suffix == ".safetensors"
    flip_bit(state)
    (log,) = (tmp_path / "run" / "tasks").rglob("training.jsonl")
    with log.open("a") as handle:
        handle.write('{"<script>": 1}\n[]\n')
    seen: list[dict[str, Any]] = []
    run_job(job, tmp_path / "run", seen.append)
    told = [event["text"] for event in seen if event["event"] == "warning"]
    assert any("the saved state before step 2 is damaged" in text for text in told)
    for folder in ("model", "tasks/regularise/model"):
        assert folder_bytes(tmp_path / "run" / folder) == folder_bytes(tmp_path / "calm" / folder)
