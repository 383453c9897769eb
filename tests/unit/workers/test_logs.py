"""Lines of logs: what is not of the kind is passed over."""

import json
from pathlib import Path

import pytest

from rayprune.workers.store.logs import EventLine, TrainingLine, read_lines

EVENT = {"event": "stage-started", "time": 12.5, "stage": "sweep", "steps": 3}
STEP = {"step": 0, "of": 2, "lm": 2, "loss": 2.5, "gradient_norm": 1.0, "tokens_per_second": 9.0}
ODD = [
    b"",
    b"{",
    b"null",
    b"3",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00",
    b"\x00" * 50,
    b"[" * 100_000,
    b'{"event": "x"}',
    b"{}",
]
ODD_EVENTS = [
    {"event": 3},
    {"event": None},
    {"time": "12"},
    {"time": None},
    {"time": float("nan")},
    {"time": float("inf")},
    {"time": True},
    {"time": 10**400},
    {"time": 1e308},
    {"elapsed": -1.0},
    {"stage": 7},
    {"peak_memory_bytes": [1]},
    {"peak_memory_bytes": {"driver": "much"}},
    {"peak_memory_bytes": {"driver": -1}},
    {"peak_memory_bytes": {"driver": 1.5}},
    {"busy_seconds": {"worker-0": -1.0}},
]
ODD_STEPS = [
    {"step": -1},
    {"step": 1.5},
    {"step": "0"},
    {"loss": float("nan")},
    {"loss": None},
    {"loss": 1e308},
    {"lm": "low"},
    {"<script>": {}},
    {"tokens_per_second": -1.0},
]


def read(tmp_path: Path, kind: type[EventLine | TrainingLine], lines: list[bytes]) -> object:
    (tmp_path / "log").write_bytes(b"\n".join(lines) + b"\n")
    return read_lines(tmp_path / "log", kind)


@pytest.mark.parametrize(("kind", "value"), [(EventLine, EVENT), (TrainingLine, STEP)])
def test_lines_that_are_none_are_passed_over(
    kind: type[EventLine | TrainingLine], value: dict[str, object], tmp_path: Path
) -> None:
    good = json.dumps(value).encode()
    assert read(tmp_path, kind, [good, *ODD, good, good[:-3]]) == [value, value]
    assert read_lines(tmp_path / "absent", kind) == []


@pytest.mark.parametrize("change", ODD_EVENTS, ids=str)
def test_an_event_that_is_none(change: dict[str, object], tmp_path: Path) -> None:
    assert read(tmp_path, EventLine, [json.dumps(EVENT | change).encode()]) == []


@pytest.mark.parametrize("change", ODD_STEPS, ids=str)
def test_a_training_step_that_is_none(change: dict[str, object], tmp_path: Path) -> None:
    assert read(tmp_path, TrainingLine, [json.dumps(STEP | change).encode()]) == []


@pytest.mark.parametrize("missing", ["step", "of", "loss", "gradient_norm", "tokens_per_second"])
def test_a_training_step_that_lacks_something(missing: str, tmp_path: Path) -> None:
    rest = {name: value for name, value in STEP.items() if name != missing}
    assert read(tmp_path, TrainingLine, [json.dumps(rest).encode()]) == []
