"""The run folder: whose it is, who writes, what is finished."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.execution.run_folder import (
    EVENTS_FILE,
    JOB_FILE,
    LOCK_FILE,
    RunFolder,
    environment,
    read_events,
    seconds_per_stage,
)
from rayprune.specs.errors import SpecError, VerificationError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import MANIFEST_NAME, commit, write_text
from rayprune.workers.store.layout import EXPORT_TASK, task_folder


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
    ("section", "options", "line"),
    [
        ("budget", {"sparsity": 0.3}, "budget.sparsity: 0.2 -> 0.3"),
        ("calibration", {"samples": 64}, "calibration.samples: 128 -> 64"),
        ("correction", {"damping": 0.1}, 'correction.damping: "held-out" -> 0.1'),
        ("parallel", {"micro_batch": 2}, "parallel.micro_batch: 4 -> 2"),
        ("export", {"target": "vllm"}, 'export.target: "transformers" -> "vllm"'),
    ],
)
def test_another_job_is_refused_with_the_field(
    section: str, options: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with RunFolder(tmp_path, make()):
        pass
    before = (tmp_path / JOB_FILE).read_bytes()
    with (
        pytest.raises(SpecError, match="belongs to another job") as caught,
        RunFolder(tmp_path, make(**{section: options})),
    ):
        pass
    assert line in str(caught.value)
    assert (tmp_path / JOB_FILE).read_bytes() == before
    with RunFolder(tmp_path, make()):  # the refused attempt has let go of the lock
        pass


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("parallel", {"workers": 4}),
        ("parallel", {"retries": 9}),
        ("memory", {"worker": "8GiB"}),
        ("cluster", {"executor": "in-process"}),
        ("evaluation", {"path": "/e"}),
    ],
)
def test_the_same_job_may_run_elsewhere(
    section: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with RunFolder(tmp_path, make()) as first:
        fingerprint = first.fingerprint("task", "input")
    with RunFolder(tmp_path, make(**{section: options})) as second:
        assert load_job(tmp_path / JOB_FILE) == make(**{section: options})
        assert second.fingerprint("task", "input") == fingerprint


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with (
        pytest.raises(
            SpecError, match=r"is not empty and holds no job\.yaml; --out must name a new folder"
        ),
        RunFolder(tmp_path, make()),
    ):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


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


def test_fingerprints_hold_all_a_result_depends_on(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path, make()), RunFolder(tmp_path, make(budget={"sparsity": 0.5}))
    prints = [
        folder.fingerprint("a"),
        folder.fingerprint("b"),
        folder.fingerprint("a", "x"),
        folder.fingerprint("a", "x", "y"),
        folder.fingerprint("a", "y", "x"),
        folder.fingerprint("a", part={"only": 1}),
        other.fingerprint("a"),
    ]
    assert len(set(prints)) == len(prints)
    assert other.fingerprint("a", part={"only": 1}) == folder.fingerprint("a", part={"only": 1})
    assert {"torch", "transformers", "machine", "code"} <= environment().keys()


def finish(folder: RunFolder, task: str, fingerprint: str) -> Path:
    path = task_folder(folder.path, task)
    write_text(path / "artifact", "content")
    commit(path, task, fingerprint, ["artifact"], {"n": 1})
    return path


@pytest.mark.parametrize("task", ["layer-0000", EXPORT_TASK])
def test_finished(task: str, tmp_path: Path) -> None:
    with RunFolder(tmp_path, make()) as folder:
        assert folder.finished(task, "f") is None
        path = finish(folder, task, "f")
        done = folder.finished(task, "f")
        assert done is not None
        assert done.info == {"n": 1}
        with pytest.raises(
            VerificationError, match=r"made from other inputs .*choose another --out, or delete"
        ):
            folder.finished(task, "g")
        assert folder.finished(task, "g", redo_stale=True) is None
        (path / "artifact").write_text("c0ntent")
        assert folder.finished(task, "f") is None
        assert folder.finished(task, "g") is None
        (path / "artifact").unlink()
        assert folder.finished(task, "f") is None
        finish(folder, task, "f")
        (path / MANIFEST_NAME).write_text("{")
        assert folder.finished(task, "f") is None


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


def test_the_lock_file_alone_does_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("")
    with RunFolder(tmp_path, make()) as folder:
        folder.emit({"event": "run-started"})
    assert json.loads((tmp_path / EVENTS_FILE).read_text())["event"] == "run-started"
