"""A layer's file is written while the next layer is worked on: what a lost worker had not written
yet is decided again, and nothing else.
"""

from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.execution.executor import InProcessExecutor
from rayprune.orchestrator.execution.failures import Failure, WorkerFailure
from rayprune.orchestrator.execution.steps import Call
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ResourceError
from rayprune.specs.loader import load_job
from rayprune.workers.steps.writing import Writing
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

NUM_LAYERS = 4
submit = InProcessExecutor._submit


@pytest.mark.parametrize("checkpoint_layers", [0, 1, 2])
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("lost_at", ["finish_writing", "advance", "collect"])
def test_the_layer_that_a_lost_worker_was_writing_is_decided_again(
    lost_at: str,
    layer: int,
    checkpoint_layers: int,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lost_at != "finish_writing" and layer == NUM_LAYERS - 1:
        pytest.skip("nothing follows the last layer")
    job = load_job(
        make_job(
            make_model(num_hidden_layers=NUM_LAYERS),
            budget={"kv_groups": 1},
            memory={"checkpoint_layers": checkpoint_layers},
        )
    )
    run_job(job, tmp_path / "calm", quiet)
    written = False
    lost = 0

    def losing(self: InProcessExecutor, worker: int, step: str, *args: Any) -> Call[Any]:
        nonlocal written, lost
        if step == "write_layer" and args[0] == layer and not written:
            written = True
            receipt = {"seconds": 0.0, "peak_memory_bytes": {}, "warned": []}
            return Call(worker, step, receipt, None)  # it never gets to the disk
        if written and not lost and step in (lost_at, "finish_writing"):
            lost += 1
            self.drop_workers()
            raise WorkerFailure(Failure.PROCESS_LOST, "gone")
        return submit(self, worker, step, *args)

    monkeypatch.setattr(InProcessExecutor, "_submit", losing)
    events: list[dict[str, Any]] = []
    run_job(job, tmp_path / "lost", events.append)
    assert lost == 1
    failed = [event["task"] for event in events if event["event"] == "worker-failed"]
    assert failed == [f"layer-{min(layer + 1, NUM_LAYERS - 1):04d}"]
    swept = [e["layer"] for e in events if e["event"] == "step-finished" and e["stage"] == "sweep"]
    assert swept == list(range(NUM_LAYERS))
    assert folder_bytes(tmp_path / "lost" / "model") == folder_bytes(tmp_path / "calm" / "model")


@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
def test_a_file_that_cannot_be_written_stops_the_run(
    layer: int,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = load_job(make_job(make_model(num_hidden_layers=NUM_LAYERS)))
    write = Writing._write

    def full(self: Writing, task: Any, *rest: Any) -> None:
        if task.name == f"layer-{layer:04d}":
            raise OSError(28, "No space left on device")
        write(self, task, *rest)

    monkeypatch.setattr(Writing, "_write", full)
    with pytest.raises(ResourceError, match="No space left"):
        run_job(job, tmp_path / "run", quiet)
    tasks = tmp_path / "run" / "tasks"
    there = {path.parent.name for path in tasks.glob("layer-*/manifest.json")}
    assert there == {f"layer-{number:04d}" for number in range(layer)}
    monkeypatch.undo()
    run_job(job, tmp_path / "run", quiet)
    run_job(job, tmp_path / "calm", quiet)
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(tmp_path / "calm" / "model")
