"""kill -9 of the driver at every phase of a layer: the same command again finishes with the same
bytes.
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

CRASH = """
import os, sys
import rayprune.workers.store.files as files
from rayprune.orchestrator.cli import main

function, target, when = sys.argv[1:4]
original = getattr(files.os if function in ("replace", "fsync") else files, function)

def dying(*args, **kwargs):
    hit = target in str(args[0])
    if hit and when == "before":
        os._exit(9)
    result = original(*args, **kwargs)
    if hit and when == "after":
        os._exit(9)
    return result

setattr(files.os if function in ("replace", "fsync") else files, function, dying)
sys.exit(main(sys.argv[4:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "target", "when"),
    [
        ("replace", "calibration-tokens/", "before"),
        ("replace", "shape/", "after"),
        ("replace", "layer-0001/.layer", "before"),
        ("replace", "layer-0001/.layer", "after"),
        ("replace", "layer-0001/.manifest", "before"),
        ("replace", "layer-0001/.manifest", "after"),
        ("replace", "cache/", "before"),
        ("replace", "model/.config", "before"),
        ("replace", "model/.model.safetensors.index", "before"),
        ("replace", "model/.manifest", "before"),
        ("replace", ".report", "before"),
    ],
)
def test_driver_dies_at_any_phase(
    function: str, target: str, when: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    assert_survives(
        make_job(make_model(), memory={"checkpoint_layers": 1}), function, target, when, tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "when"),
    [
        ("survey-0001/.cuts", "before"),
        ("survey-0002/.manifest", "after"),
        ("sensitivity/.manifest", "before"),
        ("generation-0001/.manifest", "after"),
    ],
)
def test_driver_dies_while_it_allocates(
    target: str, when: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    search = {"name": "search", "generations": 3, "offspring": 4, "samples": 2, "levels": 6}
    job = make_job(
        make_model(num_hidden_layers=4), budget={"per_layer": True, "allocation": search}
    )
    assert_survives(job, "replace", target, when, tmp_path)


def assert_survives(job: Path, function: str, target: str, when: str, tmp_path: Path) -> None:
    """A driver that dies there leaves finished tasks, which the next one does not repeat; its bytes
    are those of a calm run.
    """
    arguments = ["run", str(job), "--out", str(tmp_path / "crashed")]
    assert main(["run", str(job), "--out", str(tmp_path / "calm")]) == 0
    crashed = subprocess.run(
        [sys.executable, "-c", CRASH, function, target, when, *arguments],
        capture_output=True,
        timeout=100,
    )
    assert crashed.returncode == 9, crashed.stderr.decode()
    finished = {
        path.parent.name: path.stat().st_mtime_ns
        for path in (tmp_path / "crashed" / "tasks").glob("*/manifest.json")
    }
    assert main(arguments) == 0
    for task, written in finished.items():
        assert (
            tmp_path / "crashed" / "tasks" / task / "manifest.json"
        ).stat().st_mtime_ns == written, f"{task} was repeated"
    assert folder_bytes(tmp_path / "crashed" / "model") == folder_bytes(tmp_path / "calm" / "model")
    assert not list((tmp_path / "crashed" / "model").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("killing", [signal.SIGKILL, signal.SIGTERM])
def test_driver_with_ray_is_killed_in_mid_sweep(
    killing: signal.Signals, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
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
    deadline = time.monotonic() + 90
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
    assert folder_bytes(out / "model") == folder_bytes(tmp_path / "calm" / "model")


def test_damaged_layer_is_redone_alone(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, out = make_job(make_model()), tmp_path / "run"
    assert main(["run", str(job), "--out", str(out)]) == 0
    before = folder_bytes(out / "model")
    file = out / "tasks" / "layer-0001" / "layer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.unlink()
    file.write_bytes(data)
    times = {
        n: (out / "tasks" / f"layer-000{n}" / "manifest.json").stat().st_mtime_ns for n in (0, 2)
    }
    assert main(["run", str(job), "--out", str(out)]) == 0
    assert {
        n: (out / "tasks" / f"layer-000{n}" / "manifest.json").stat().st_mtime_ns for n in (0, 2)
    } == times
    assert folder_bytes(out / "model") == before


def test_two_drivers_at_once(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayprune.orchestrator.execution.run_folder import RunFolder
    from rayprune.specs.loader import load_job

    job = make_job(make_model())
    with RunFolder(tmp_path / "run", load_job(job)):
        assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 2
    assert "another run is writing here" in capsys.readouterr().err
