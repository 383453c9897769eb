"""What trackers get of a run: every number once, under one name and step."""

import struct
from pathlib import Path

import pytest

from rayprune.orchestrator import tracking
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.tracking import scalars, settings, track
from rayprune.specs.errors import ResourceError
from rayprune.specs.loader import dump_job, load_job
from rayprune.workers.store.layout import JOB_FILE
from rayprune.workers.store.plain import check_plain
from tests.unit.orchestrator.test_html_report import make_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    report = Report.model_validate(make_report() | {"run": str(tmp_path)})
    (tmp_path / "report.json").write_text(report.model_dump_json())
    job = load_job({"model": {"path": "m"}, "calibration": {"path": "c"}, "recipe": "balanced"})
    (tmp_path / JOB_FILE).write_text(dump_job(job))
    return tmp_path


def test_every_number_has_one_place(run: Path) -> None:
    report = Report.model_validate(make_report() | {"run": str(run)})
    found = list(scalars(report))
    assert len({(each.name, each.step) for each in found}) == len(found)
    by_name = {each.name: each.value for each in found if not each.step}
    assert by_name["parameters/after"] == report.parameters.after
    assert by_name["seconds/total"] == report.seconds["total"]
    layers = [each for each in found if each.name.endswith("held_out_error")]
    assert {each.step for each in layers} == {layer.layer for layer in report.layers}
    assert settings(run)["correction.drift"] == "0.5"


def test_tensorboard_gets_them_once(run: Path) -> None:
    pytest.importorskip("tensorboardX")
    sent = [track(run, "tensorboard", None) for _ in range(2)]
    (file,) = (run / "tensorboard").iterdir()
    content, records, at = file.read_bytes(), 0, 0
    while at < len(content):  # length, its checksum, the record, its checksum
        at += 8 + 4 + struct.unpack_from("<Q", content, at)[0] + 4
        records += 1
    assert sent[0] == sent[1] == records - 2, "beside the file's version and the job"


def test_a_folder_holds_the_numbers_of_several_runs(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    place = tmp_path / "all"
    place.mkdir()
    (place / "events.out.tfevents.others").write_text("somebody's")
    for _ in range(2):
        track(run, "tensorboard", str(place))
    assert (place / "events.out.tfevents.others").read_text() == "somebody's"
    (folder,) = (each for each in place.iterdir() if each.is_dir())
    assert folder.name.startswith(f"{run.name}-")
    assert len(list(folder.iterdir())) == 1


def test_wandb_gets_a_folder_once(run: Path) -> None:
    pytest.importorskip("wandb")
    sent = [track(run, "wandb", None) for _ in range(2)]
    assert sent[0] == sent[1] > 0
    (folder,) = run.glob("wandb/offline-run-*")
    assert list(folder.glob("*.wandb"))
    check_plain(run, "a run folder holds no links")


def test_trackio_gets_them_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run / "trackio"))
    trackio = pytest.importorskip("trackio")
    sent = [track(run, "trackio", "one") for _ in range(2)]
    assert sent[0] == sent[1] > 0
    assert [each.name.startswith(run.name) for each in trackio.Api().runs("one")] == [True]


def test_a_tracker_that_refuses_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedError(Exception):
        """Another package's."""

    def refuse(*_: object) -> None:
        raise RefusedError("no such place\nTraceback (most recent call last): ...")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", refuse)
    with pytest.raises(ResourceError, match=r"^mlflow at x://y: does not take .*: no such place;"):
        track(run, "mlflow", "x://y")


def test_a_missing_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ResourceError, match=r"rayprune\[mlflow\]"):
        track(run, "mlflow", None)
