"""`placement: layers`: chunks, waves, executors and restarts never change the bytes; every
propagation gives a model that loads.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages import stream
from rayprune.specs.errors import VerificationError
from rayprune.specs.loader import load_job
from rayprune.workers.passes.stream import Stream
from tests.conftest import edit_manifest, folder_bytes, write_job
from tests.helpers import quiet, some
from tests.models import build_model

_empty_fits = Stream._empty_fits
DECIDED_IN = {"dense": "layer-0001", "refit": "selection-0001"}
"""The task that decides on a layer, by propagation."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A job over 5 layers with both groups pruned, 22 windows in 5 shards of uneven size."""
    calibration = {"samples": 22, "shards": 5, "held_out_shards": 2}
    parallel = {"placement": "layers", "micro_batch": 2}
    folder = tmp_path_factory.mktemp("stream")
    return write_job(
        folder / "job.yaml",
        text_file,
        build_model(folder / "dense", num_hidden_layers=5),
        budget={"kv_groups": 1},
        calibration=calibration,
        parallel=parallel | {"device": "cpu"},
    )


@pytest.fixture(scope="module")
def expected(job: Path) -> dict[str, bytes]:
    """The exported folder of an undisturbed in-process run."""
    run_job(load_job(job), job.parent / "expected", quiet)
    return folder_bytes(job.parent / "expected" / "model")


@pytest.mark.parametrize("layers_per_chunk", some([1, 3], 3))
def test_waves_give_the_same_bytes(
    layers_per_chunk: int, job: Path, expected: Any, tmp_path: Path, force_memory: Any
) -> None:
    force_memory(layers_per_chunk=layers_per_chunk)
    run_job(load_job(job), tmp_path / "waves", quiet)
    assert folder_bytes(tmp_path / "waves" / "model") == expected
    assert not (tmp_path / "waves" / "cache").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("workers", "layers_per_chunk"), [(1, 5), (2, 2), (3, 1)])
def test_workers_give_the_same_bytes(
    workers: int, layers_per_chunk: int, job: Path, expected: Any, tmp_path: Path, force_memory: Any
) -> None:
    force_memory(layers_per_chunk=layers_per_chunk)
    run_job(
        load_job(job, ["cluster.executor=ray", f"parallel.workers={workers}"]),
        tmp_path / "ray",
        quiet,
    )
    assert folder_bytes(tmp_path / "ray" / "model") == expected


@pytest.mark.parametrize("stop_after", some([0, 1, 2], 1))
def test_a_restart_goes_on_behind_the_last_wave(
    stop_after: int, job: Path, expected: Any, tmp_path: Path, force_memory: Any
) -> None:
    """The driver is stopped after a layer of some wave, then goes on with other waves."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("layer") == stop_after:
            raise KeyboardInterrupt

    force_memory(layers_per_chunk=2)
    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(job), tmp_path / "run", stop)
    again: list[dict[str, Any]] = []
    force_memory(layers_per_chunk=3)
    run_job(load_job(job), tmp_path / "run", again.append)
    finished = [
        event["layer"]
        for event in again
        if event["event"] == "step-finished" and event["stage"] == "sweep"
    ]
    assert finished
    assert min(finished) > stop_after, "a finished layer is not decided again"
    assert folder_bytes(tmp_path / "run" / "model") == expected


@pytest.mark.parametrize("propagation", some(DECIDED_IN, "dense"))
def test_a_restart_on_another_kind_of_device_is_refused(
    propagation: str, job: Path, tmp_path: Path, force_memory: Any
) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("layer") == 1:
            raise KeyboardInterrupt

    force_memory(layers_per_chunk=2)
    task = DECIDED_IN[propagation]
    settings = [f"parallel.propagation={propagation}"]
    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(job, settings), tmp_path / "run", stop)
    edit_manifest(
        tmp_path / "run" / "tasks" / task,
        lambda value: value["made_from"].update(computed_on="cuda in bfloat16"),
    )
    with pytest.raises(
        VerificationError,
        match=f'{task}: .*computed_on: "cuda in bfloat16" -> "cpu in float32".*--redo stale',
    ):
        run_job(load_job(job, settings), tmp_path / "run", quiet)


def test_statistics_of_a_group_that_loses_nothing_are_not_collected(
    job: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    watched: list[str] = []
    monkeypatch.setattr(
        Stream,
        "_empty_fits",
        lambda stream, name: watched.append(name) or _empty_fits(stream, name),
    )
    run_job(load_job(job, ["budget.kv_groups=2"]), tmp_path / "run", quiet)
    assert set(watched) == {"neurons"}


@pytest.mark.slow
@pytest.mark.parametrize("propagation", ["dense", "refit"])
def test_every_propagation_gives_a_model_that_loads(
    propagation: str, job: Path, tmp_path: Path
) -> None:
    assert (
        main(
            [
                "run",
                str(job),
                "--out",
                str(tmp_path / "run"),
                "--set",
                f"parallel.propagation={propagation}",
            ]
        )
        == 0
    )
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(info.values())
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_waves_are_even_and_cover_every_layer() -> None:
    assert stream.waves(range(30), 2, 15) == [[range(15), range(15, 30)]]
    assert stream.waves(range(7), 2, 2) == [[range(1), range(1, 3)], [range(3, 5), range(5, 7)]]
    assert stream.waves(range(4, 7), 4, 9) == [[range(4, 5), range(5, 6), range(6, 7)]]
    assert stream.waves(range(0), 2, 3) == []
