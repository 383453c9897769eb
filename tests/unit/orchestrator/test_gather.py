"""Curves of trainings from logs that others may have written to."""

import json
from pathlib import Path
from typing import Any

from rayprune.orchestrator.reporting.gather import timeline, trainings

LINE = {"of": 3, "transfer": 0.5, "gradient_norm": 1.0, "tokens_per_second": 10.0}


def log(run: Path, task: str, *lines: Any) -> None:
    folder = run / "tasks" / task
    folder.mkdir(parents=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "training.jsonl").write_text(text)


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": loss, **LINE, **more}


def test_layers_whose_logs_differ_are_one_training(tmp_path: Path) -> None:
    """A line that is missing, one twice, one torn, one with more in it."""
    odd = step(1, 3.0, **{"<script>": 1.0})
    log(tmp_path, "regularised-0000", step(0, 4.0), odd, step(2, 2.0), '{"step": 3, "lo')
    log(tmp_path, "regularised-0001", step(0, 2.0), step(2, 9.0), "[]\n", step(2, 1.0))
    found = trainings(tmp_path, ["regularised-0000", "regularised-0001"])
    assert found["layers"].curves["loss"] == (3.0, 1.5)
    assert found["layers"].curves.keys() == {"loss", "transfer", "gradient_norm"}


def test_logs_without_a_step_in_common_are_none(tmp_path: Path) -> None:
    log(tmp_path, "regularised-0000", step(0, 4.0))
    log(tmp_path, "regularised-0001", "[]\n")
    log(tmp_path, "recover", "\x00\n")
    assert trainings(tmp_path, ["regularised-0000", "regularised-0001", "recover"]) == {}


def test_the_time_line_goes_on_over_attempts() -> None:
    """One that is cut off in its second stage, and one that goes on."""
    events = [
        {"event": "run-started", "elapsed": 0.0},
        {"event": "stage-started", "elapsed": 1.0, "stage": "start"},
        {
            "event": "stage-finished",
            "elapsed": 3.0,
            "stage": "start",
            "busy_seconds": {"worker-0": 1.5},
        },
        {"event": "stage-started", "elapsed": 4.0, "stage": "sweep"},
        {"event": "task-done", "elapsed": 9.0},
        {"event": "run-started", "elapsed": 0.5},
        {"event": "stage-started", "elapsed": 1.0, "stage": "sweep"},
        {"event": "stage-finished", "elapsed": 2.0, "stage": "sweep"},
    ]
    found = [(span.stage, span.start, span.seconds, span.busy) for span in timeline(events)]
    assert found == [
        ("start", 1.0, 2.0, {"worker-0": 1.5}),
        ("sweep", 4.0, 5.0, {}),
        ("sweep", 10.0, 1.0, {}),
    ]
