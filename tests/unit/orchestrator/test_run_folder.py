"""The run folder: whose it is, who writes, what is finished."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.execution import run_folder
from rayprune.orchestrator.execution.run_folder import (
    REPORT_FILE,
    RunFolder,
    environment,
    read_events,
    seconds_per_stage,
)
from rayprune.specs.errors import SpecError, VerificationError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import Task, commit
from rayprune.workers.store.layout import EVENTS_FILE, JOB_FILE, LOCK_FILE, Scope


def make(**sections: dict[str, Any]) -> JobSpec:
    required: dict[str, dict[str, Any]] = {"model": {"path": "/m"}, "calibration": {"path": "/c"}}
    return JobSpec.model_validate(
        {name: required.get(name, {}) | sections.get(name, {}) for name in required | sections}
    )


def test_a_new_folder_holds_its_job(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "run", make()) as folder:
        assert folder.path == tmp_path / "a" / "run"
        assert load_job(folder.path / JOB_FILE) == make()
        assert {item.name for item in folder.path.iterdir()} <= {JOB_FILE, LOCK_FILE}
        assert folder.events() == []


@pytest.mark.parametrize(
    ("section", "options"),
    [("budget", {"sparsity": 0.3}), ("parallel", {"workers": 4}), ("evaluation", {"path": "/e"})],
)
def test_another_job_goes_on_in_the_folder_and_takes_the_report_away(
    section: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with RunFolder(tmp_path, make()):
        (tmp_path / REPORT_FILE).write_text("{}")
    with RunFolder(tmp_path, make()):
        assert (tmp_path / REPORT_FILE).exists()
    with RunFolder(tmp_path, make(**{section: options})):
        assert load_job(tmp_path / JOB_FILE) == make(**{section: options})
        assert not (tmp_path / REPORT_FILE).exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with (
        pytest.raises(
            SpecError, match=r"is not empty and holds no earlier run; --out must name a new folder"
        ),
        RunFolder(tmp_path, make()),
    ):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_job_file_that_a_person_has_written_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / JOB_FILE).write_text("# mine\n")
    with pytest.raises(SpecError, match="holds no earlier run"), RunFolder(tmp_path, make()):
        pass
    assert (tmp_path / JOB_FILE).read_text() == "# mine\n"


@pytest.mark.parametrize("place", ["model", "tasks/recover/model", "cache", "link"])
def test_what_the_job_reads_is_never_written_over(place: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run, make()):
        pass
    (tmp_path / "link").symlink_to(run / "model")
    read = tmp_path / "link" if place == "link" else run / place
    for section in ("model", "calibration"):
        with (
            pytest.raises(SpecError, match=r"the job reads it, and a run in .* writes there"),
            RunFolder(run, make(**{section: {"path": str(read)}})),
        ):
            pass
    assert load_job(run / JOB_FILE) == make()
    with RunFolder(tmp_path / "beside", make(model={"path": str(run / "model")})):
        pass


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(SpecError, match="cannot be used as the run folder"),
        RunFolder(tmp_path / "run", make()),
    ):
        pass


def test_a_damaged_job_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOB_FILE).write_text("model: [")
    with pytest.raises(SpecError), RunFolder(tmp_path, make()):
        pass
    (tmp_path / JOB_FILE).unlink()
    with RunFolder(tmp_path, make()):
        pass


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()):
        with (
            pytest.raises(SpecError, match="another run is writing here; wait for it"),
            RunFolder(tmp_path, make()),
        ):
            pass
        with (
            pytest.raises(SpecError, match="another run is writing here"),
            RunFolder(tmp_path, make(budget={"sparsity": 0.5})),
        ):
            pass
    with RunFolder(tmp_path, make()):
        pass


def of(folder: RunFolder, options: Any = None, inputs: Any = None, on: str | None = None) -> Task:
    return folder.task("layer-0000", Scope(folder.path), options or {}, inputs or {}, on)


def test_fingerprints_hold_all_a_result_depends_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, make())
    tasks = [
        of(folder),
        folder.task("layer-0001", Scope(folder.path), {}, {}),
        of(folder, {"budget.sparsity": 0.2}),
        of(folder, {"budget.sparsity": 0.3}),
        of(folder, {}, {"text": "a"}),
        of(folder, {}, {"model": "a"}),
        of(folder, {}, {}, "cpu in float32"),
    ]
    assert len({task.fingerprint for task in tasks}) == len(tasks)
    assert {"torch", "transformers", "machine", "code"} <= environment().keys()
    elsewhere = folder.task("layer-0000", Scope(folder.path, "step-02"), {}, {})
    assert elsewhere.folder == tmp_path / "tasks" / "step-02" / "layer-0000"
    assert elsewhere.fingerprint == tasks[0].fingerprint, "where it lies does not matter"


def test_what_is_stale_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, make())
    done = commit(of(folder, {"budget": {"sparsity": 0.2}}, {"text": "a" * 64}), [], {})
    assert folder.changes(done, of(folder, {"budget": {"sparsity": 0.2}}, {"text": "a" * 64})) == []
    assert folder.changes(done, of(folder, {"budget": {"sparsity": 0.3}}, {"text": "b" * 64})) == [
        "budget.sparsity: 0.2 -> 0.3",
        'text: "aaaaaaaa..." -> "bbbbbbbb..."',
    ]


def test_other_software_is_refused_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = commit(of(RunFolder(tmp_path, make())), [], {})
    other = environment() | {"torch": "1.0", "machine": "abacus"}
    monkeypatch.setattr(run_folder, "environment", lambda: other)
    folder = RunFolder(tmp_path, make())
    with pytest.raises(VerificationError, match="rayprune run --redo stale") as caught:
        folder.changes(done, of(folder))
    assert all(word in str(caught.value) for word in ('-> "1.0"', '-> "abacus"', "layer-0000"))
    folder = RunFolder(tmp_path, make(), redo_stale=True)
    assert len(folder.changes(done, of(folder))) == 2


def test_another_kind_of_device_is_refused_unless_the_job_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, make())
    done = commit(of(folder, {"model.dtype": "auto"}, {}, "cpu in float32"), [], {})
    with pytest.raises(VerificationError, match='computed_on: "cpu in float32" -> "cuda in'):
        folder.changes(done, of(folder, {"model.dtype": "auto"}, {}, "cuda in bfloat16"))
    assert folder.changes(done, of(folder, {"model.dtype": "bfloat16"}, {}, "cpu in bfloat16")) == [
        'computed_on: "cpu in float32" -> "cpu in bfloat16"',
        'model.dtype: "auto" -> "bfloat16"',
    ]


def test_a_manifest_of_the_first_versions_is_other_software(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, make())
    old = replace(commit(of(folder), [], {}), made_from={})
    with pytest.raises(VerificationError, match="environment"):
        folder.changes(old, of(folder))


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()) as folder:
        folder.emit({"event": "run-started", "job": "line\nbreak\u2028é"})
        folder.emit({"event": "run-finished"})
        first, second = folder.events()
    assert (first["event"], first["job"], second["event"]) == (
        "run-started",
        "line\nbreak\u2028é",
        "run-finished",
    )
    assert first["time"] <= second["time"]
    assert read_events(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "torn", [b'{"time": 3.0, "eve', b"\0\0\0\0", b'{"time": 3.0, "event": "x"}'[:-1]]
)
def test_a_torn_last_line_costs_that_line_alone(torn: bytes, tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()) as folder:
        folder.emit({"event": "run-started"})
    with (tmp_path / EVENTS_FILE).open("ab") as handle:
        handle.write(torn)
    assert [event["event"] for event in read_events(tmp_path)] == ["run-started"]
    with RunFolder(tmp_path, make()) as folder:
        folder.emit({"event": "run-started", "again": True})
        folder.emit({"event": "run-finished"})
        assert [event["event"] for event in folder.events()] == [
            "run-started",
            "run-started",
            "run-finished",
        ]


def timed(*events: tuple[float, str, str | None]) -> list[dict[str, Any]]:
    return [
        {"time": time, "event": event} | ({"stage": stage} if stage else {})
        for time, event, stage in events
    ]


def test_seconds_of_a_run_without_a_break() -> None:
    events = timed(
        (0, "run-started", None),
        (1, "stage-started", "tokenize"),
        (3, "stage-finished", "tokenize"),
        (10, "stage-started", "sweep"),
        (12, "step-finished", "sweep"),
        (17, "stage-finished", "sweep"),
        (20, "run-finished", None),
    )
    assert seconds_per_stage(events) == {"tokenize": 2, "sweep": 7}


def test_an_attempt_that_was_cut_off_counts_up_to_its_last_event() -> None:
    events = timed(
        (0, "run-started", None),
        (1, "stage-started", "sweep"),
        (4, "step-finished", "sweep"),
        (5, "worker-failed", None),
        (100, "run-started", None),
        (101, "stage-started", "sweep"),
        (103, "step-finished", "sweep"),
        (1000, "run-started", None),
        (1001, "stage-started", "tokenize"),
        (1002, "stage-finished", "tokenize"),
        (1003, "stage-started", "sweep"),
        (1007, "stage-finished", "sweep"),
        (1008, "stage-started", "export"),
    )
    assert seconds_per_stage(events) == {"sweep": 4 + 2 + 4, "tokenize": 1, "export": 0}
    assert seconds_per_stage(events[:4]) == {"sweep": 4}
    assert seconds_per_stage([]) == {}


def test_a_clock_that_is_set_back_counts_nothing_and_the_other_one_counts() -> None:
    events = timed(
        (50, "stage-started", "sweep"),
        (20, "stage-finished", "sweep"),
        (20, "stage-started", "export"),
        (9, "stage-finished", "export"),
    )
    assert seconds_per_stage(events) == {"sweep": 0, "export": 0}
    ticks = (1.0, 4.0, 4.0, 5.5)
    events = [event | {"elapsed": tick} for event, tick in zip(events, ticks, strict=True)]
    assert seconds_per_stage(events) == {"sweep": 3, "export": 1.5}


def test_events_hold_a_clock_that_is_never_set(tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()) as folder:
        for _ in range(2):
            folder.emit({"event": "x"})
        first, second = folder.events()
    assert 0 <= first["elapsed"] <= second["elapsed"] < 60


@pytest.mark.parametrize("name", ["cache", "tasks", "model"])
def test_a_file_where_a_folder_belongs_is_refused(name: str, tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()):
        (tmp_path / name).write_text("")
    with pytest.raises(SpecError, match=f"{name}: is no folder"), RunFolder(tmp_path, make()):
        pass


def test_the_record_of_another_task_is_stale(tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()) as folder:
        one, other = (folder.task(name, Scope(tmp_path), {}, {}) for name in ("a", "b"))
        done = commit(one, [], {})
        assert folder.changes(done, one) == []
        assert folder.changes(done, other) == ["it is the record of a"]


def test_temporary_files_of_a_live_run_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / f".job.yaml.{'0a' * 16}.tmp"
    with RunFolder(tmp_path, make()):
        file.write_text("half")
        with pytest.raises(SpecError, match="another run"), RunFolder(tmp_path, make()):
            pass
        assert file.exists()
    with RunFolder(tmp_path, make()):
        assert not file.exists()


def test_the_lock_file_alone_does_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("")
    with RunFolder(tmp_path, make()) as folder:
        folder.emit({"event": "run-started"})
    assert json.loads((tmp_path / EVENTS_FILE).read_text())["event"] == "run-started"
