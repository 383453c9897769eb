"""What `rayprune submit` refuses before Ray is asked, and the command it sends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution import submit
from rayprune.orchestrator.execution.submit import entrypoint, refuse_lost_paths, submission_id
from rayprune.specs.errors import ResourceError, SpecError
from rayprune.specs.loader import load_job
from tests.conftest import MakeJob, MakeModel
from tests.helpers import some

ROOT = Path(__file__).parents[3]


def refused(job: Path, *words: str, **environment: str) -> tuple[int, str]:
    """Exit code and complaint of a submit in a process of its own: it changes the environment, and
    Ray reads it at import.
    """
    kept = (
        {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        | {"PYTHONPATH": str(ROOT)}
        | environment
    )
    command = [sys.executable, "-m", "rayprune.orchestrator.cli", "submit", str(job), *words]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def job(make_model: MakeModel, make_job: MakeJob) -> Path:
    return make_job(make_model(), cluster={"executor": "ray", "address": "local"})


def test_the_command_carries_the_job(job: Path, tmp_path: Path) -> None:
    """A shell that runs the command gives `rayprune run` the same job, with the cluster's own
    address.
    """
    out = tmp_path / "a 'quoted' folder"
    (tmp_path / "rayprune").write_text('#!/bin/sh\necho "$@"\ncat "$2"\n')
    (tmp_path / "rayprune").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = entrypoint(load_job(job), out)
    done = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, check=True
    )
    first, _, text = done.stdout.partition("\n")
    assert first == f"run /dev/stdin --out {out}"
    (tmp_path / "received.yaml").write_text(text)
    assert load_job(tmp_path / "received.yaml") == load_job(job, ["cluster.address=auto"])


class Agentless:
    """A cluster whose agent is not there yet for so many calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def submit_job(self, entrypoint: str, submission_id: str) -> str:
        self.left -= 1
        if self.left >= 0:
            raise RuntimeError("status code 500: No available agent to submit job")
        return submission_id


def test_a_cluster_whose_agent_is_still_starting_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    assert submit._accepted(Agentless(3), "rayprune", "one") == "one"
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(ResourceError, match=r"did not accept one.*--dashboard-agent-listen-port"):
        submit._accepted(Agentless(10**6), "rayprune", "one")


def test_every_attempt_has_another_id() -> None:
    one, two = submission_id(Path("/runs/my run")), submission_id(Path("/runs/my run"))
    assert one != two
    assert one.startswith("rayprune-my-run-2")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8265",
        "auto",
        "ray://127.0.0.1:10001",
        "json://127.0.0.1:1",
        "http://localhost:abc",
        "http://localhost:99999",
        "http://[::1",
    ],
)
def test_an_address_that_is_no_dashboard(
    address: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(job), "--out", str(tmp_path / "run"), "--address", address]) == 2
    assert (
        f"--address {address}: write the address of the cluster's dashboard"
        in capsys.readouterr().err
    )


def test_a_relative_run_folder(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(job), "--out", "runs/one", "--address", "http://127.0.0.1:1"]) == 2
    assert "--out runs/one: is relative" in capsys.readouterr().err


def test_the_command_carries_what_run_understands(job: Path) -> None:
    command = entrypoint(load_job(job), Path("/run"), redo="stale", store=Path("/a store"))
    assert command.splitlines()[0] == (
        "exec rayprune run /dev/stdin --out /run --redo stale --store '/a store' <<'END_OF_JOB'"
    )


def test_paths_that_a_ray_job_would_lose_are_those_of_all_texts(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Path.cwd() / "lost.txt"
    spec = load_job(job, [f"recover={{text: {{path: {job}, mix: [{{path: {lost}}}]}}}}"])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "x"}}')
    with pytest.raises(SpecError, match=r"recover\.text\.mix\.0\.path .*: lies in the Ray job"):
        refuse_lost_paths(spec, Path("/runs/one"), None)


def test_a_relative_store(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", str(job), "--out", "/runs/one", "--store", "store"]
    assert main([*words, "--address", "http://127.0.0.1:1"]) == 2
    assert "--store store: is relative" in capsys.readouterr().err


def test_without_a_token(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    code, complaint = refused(
        job, "--out", "/run", "--address", "http://127.0.0.1:1", HOME=str(tmp_path)
    )
    assert code == 2
    assert "no Ray token on this machine; set RAY_AUTH_TOKEN" in complaint


@pytest.mark.parametrize(
    "environment",
    some([{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}]),
    ids=["token", "no token"],
)
def test_an_address_where_nobody_listens(
    environment: dict[str, str], job: Path, tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    start = time.monotonic()
    code, complaint = refused(
        job, "--out", "/run", "--address", "http://127.0.0.1:1", HOME=str(tmp_path), **environment
    )
    assert code == 4
    assert "--address http://127.0.0.1:1: cannot connect" in complaint
    assert time.monotonic() - start < 20


def test_without_rays_job_client(job: Path, tmp_path: Path) -> None:
    """An empty entry in `sys.modules` is how Python marks a module that cannot be imported."""
    script = (
        "import sys; sys.modules['aiohttp'] = None; from rayprune.orchestrator.cli import main;"
        " sys.exit(main(sys.argv[1:]))"
    )
    words = ["submit", str(job), "--out", str(tmp_path / "run"), "--address", "http://127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert 'install rayprune with its extra "cluster"' in done.stderr


def test_lost_paths_inside_a_ray_job(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert main(["run", str(job), "--out", "run"]) == 2
    assert "--out run: is relative" in capsys.readouterr().err
    assert main(["run", str(job), "--out", "/runs/one", "--store", "store"]) == 2
    assert "--store store: is relative" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 2
    assert (
        f"--out {tmp_path / 'run'}: lies in the Ray job's working directory"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert main(["run", str(job), "--out", "/nowhere/run"]) == 2
    assert "model.path" in capsys.readouterr().err
