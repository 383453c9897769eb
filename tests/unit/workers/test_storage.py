"""A worker that does not see the driver's files says so, naming its node, the path and what to
do.
"""

import socket
from pathlib import Path

import pytest

from rayprune.orchestrator.execution.executor import InProcessExecutor
from rayprune.orchestrator.execution.steps import Steps
from rayprune.specs.errors import ResourceError
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.files import record_of
from rayprune.workers.store.storage import marker_file
from tests.conftest import MakeJob, MakeModel


@pytest.fixture
def worker(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> Steps:
    job = load_job(make_job(make_model()))
    return InProcessExecutor(job, tmp_path / "run", lambda _: MemoryPlan()).on(0)


def test_the_same_files(worker: Steps, tmp_path: Path) -> None:
    with marker_file(tmp_path) as marker:
        call = worker.check_storage(
            {str(path): record_of(path) for path in (marker, tmp_path / "dense" / "config.json")}
        )
    assert call.receipt["seconds"] >= 0
    assert call.payload is None
    assert not marker.exists()


def test_no_two_markers_are_alike(tmp_path: Path) -> None:
    with marker_file(tmp_path) as one, marker_file(tmp_path) as two:
        assert one.name != two.name
        assert one.read_bytes() != two.read_bytes()
        assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}, (
            "a run folder may hold such files before its job.yaml"
        )


def test_a_run_folder_out_of_sight(worker: Steps, tmp_path: Path) -> None:
    with marker_file(tmp_path) as marker:
        expected = {str(tmp_path / "elsewhere" / marker.name): record_of(marker)}
    with pytest.raises(
        ResourceError,
        match=rf"node {socket.gethostname()}.*elsewhere.*No such file.*mount.*every node",
    ) as caught:
        worker.check_storage(expected)
    assert caught.value.exit_code == 4


def test_another_model_under_the_same_path(worker: Steps, tmp_path: Path) -> None:
    config = tmp_path / "dense" / "config.json"
    expected = {str(config): record_of(config)}
    config.write_text(config.read_text() + "\n")
    with pytest.raises(
        ResourceError, match=r"config\.json: is another file here than on the driver's node"
    ):
        worker.check_storage(expected)
