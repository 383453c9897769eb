"""The driver of a private Ray is killed, or told to end, in mid-sweep: the same command again
finishes with the same bytes. tests/faults/test_crash.py has every other place to die.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.faults.conftest import Record
from tests.faults.reliability import Row

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.mark.parametrize("killing", [signal.SIGKILL, signal.SIGTERM])
def test_driver_with_ray_is_killed_in_mid_sweep(
    killing: signal.Signals,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    record: Record,
) -> None:
    job = make_job(
        make_model(num_hidden_layers=40), memory={"checkpoint_layers": 3}, budget={"kv_groups": 1}
    )
    assert main(["run", str(job), "--out", str(tmp_path / "calm")]) == 0
    out = tmp_path / "killed"
    arguments = [
        "run",
        str(job),
        "--out",
        str(out),
        "--set",
        "cluster.executor=ray",
        "--set",
        "parallel.workers=2",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-m", "rayprune.orchestrator.cli", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while not (out / "tasks" / "layer-0005" / "manifest.json").exists():
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.01)
    driver.send_signal(killing)
    assert driver.wait(30) == (130 if killing is signal.SIGTERM else -9)
    done = {path.parent.name for path in (out / "tasks").glob("layer-*/manifest.json")}
    assert 6 <= len(done) < 40
    assert main(["run", str(job), "--out", str(out)]) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    restart = max(number for number, event in enumerate(events) if event["event"] == "run-started")
    again = {
        f"layer-{event['layer']:04d}"
        for event in events[restart:]
        if event["event"] == "step-finished" and "seconds" in event
    }
    assert not again & done
    equal = folder_bytes(out / "model") == folder_bytes(tmp_path / "calm" / "model")
    what = f"the driver gets {killing.name} in mid-sweep"
    record(Row("cluster", "a private Ray", what, "goes on", "nothing done twice", 1, equal))
    assert equal
