"""What a second attempt must not take over from the first: layers above another layer, perplexities
in another type, files of an unfinished export.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import MANIFEST_NAME, Task, commit, read_manifest
from rayprune.workers.store.layout import LAYER_FILE, layer_task, task_folder
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet


def test_a_layer_above_another_layer_is_not_taken_over(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """It saw activations that are no more."""
    job = load_job(make_job(make_model(num_hidden_layers=2)))
    run_job(job, tmp_path / "run", quiet)
    folder = task_folder(tmp_path / "run", layer_task(0))
    tensors, done = load_file(folder / LAYER_FILE), read_manifest(folder)
    assert done is not None
    next(iter(tensors.values())).add_(1.0)
    (folder / LAYER_FILE).unlink()  # model/ has the same file under its own name
    save_file(tensors, folder / LAYER_FILE, metadata={"format": "pt"})
    commit(Task(done.task, folder, done.made_from), done.files, done.info)
    seen: list[dict[str, Any]] = []
    run_job(job, tmp_path / "run", seen.append)
    stale = {event["task"]: event["changed"] for event in seen if event["event"] == "task-stale"}
    assert "layer-0001" in stale
    assert "layer-0000" not in stale


@pytest.fixture
def evaluated(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> Path:
    """A job with an evaluation."""
    text = tmp_path / "held_out.txt"
    text.write_text("Nothing of this stands in the other text, as far as anybody knows. " * 20)
    section = {"path": str(text), "window": 32, "max_windows": 4}
    return make_job(make_model(num_hidden_layers=2), evaluation=section)


@pytest.mark.parametrize("option", ["model.dtype=bfloat16", "evaluation.stride=16"])
def test_a_perplexity_of_another_protocol_is_not_taken_over(
    option: str, evaluated: Path, tmp_path: Path
) -> None:
    first = run_job(load_job(evaluated), tmp_path / "run", quiet)
    second = run_job(load_job(evaluated, [option]), tmp_path / "run", quiet)
    assert first.perplexity is not None
    assert second.perplexity is not None
    assert first.perplexity.before != second.perplexity.before


def test_a_text_that_is_read_in_another_form_is_read_again(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """The same bytes under a name that promises a table."""
    rows = "\n".join(f"Row {number} of a column that is named text." for number in range(200))
    for name in ("rows.txt", "rows.csv", "again.txt"):
        (tmp_path / name).write_text(f"text\n{rows}\n")
    job, model = make_job(make_model(num_hidden_layers=2)), {}
    for run, name in (("run", "rows.txt"), ("run", "rows.csv"), ("new", "rows.csv")):
        events: list[dict[str, Any]] = []
        run_job(
            load_job(job, [f"calibration.path={tmp_path / name}"]), tmp_path / run, events.append
        )
        (read,) = (event for event in events if event["event"] == "text")
        assert read["forms"] == ["csv" if name.endswith("csv") else "text"]
        model[run, name] = folder_bytes(tmp_path / run / "tasks" / "calibration-tokens")
    found = [model[key]["tokens.safetensors"] for key in model]
    assert found[0] != found[1] == found[2]
    words = [f"calibration.path={tmp_path / 'again.txt'}"]
    run_job(load_job(job, [f"calibration.path={tmp_path / 'rows.txt'}"]), tmp_path / "run", quiet)
    again: list[dict[str, Any]] = []
    run_job(load_job(job, words), tmp_path / "run", again.append)
    assert not [event for event in again if event["event"] == "task-stale"]


def test_an_unfinished_export_leaves_nothing_behind(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, model = load_job(make_job(make_model(num_hidden_layers=2))), tmp_path / "run" / "model"
    run_job(job, tmp_path / "run", quiet)
    expected = folder_bytes(model)
    (model / MANIFEST_NAME).unlink()
    (model / "model-00009-of-00009.safetensors").write_bytes(b"of another number of layers")
    (model / "modeling_other.py").write_text("of an earlier attempt")
    run_job(job, tmp_path / "run", quiet)
    assert folder_bytes(model) == expected


def test_weights_that_were_only_touched_leave_the_report(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """A hard link, as backups make them, changes when a file was changed, not what it holds."""
    dense = make_model(num_hidden_layers=2)
    job, report = load_job(make_job(dense)), tmp_path / "run" / "report.json"
    run_job(job, tmp_path / "run", quiet)
    there: list[bool] = []
    for file in dense.glob("*.safetensors"):
        (tmp_path / f"backup-{file.name}").hardlink_to(file)
    run_job(job, tmp_path / "run", lambda event: there.append(report.exists()))
    assert all(there)
