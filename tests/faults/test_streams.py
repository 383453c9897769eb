"""Standard streams that are closed, full or no longer read: a run is not lost for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayprune.orchestrator import cli
from rayprune.orchestrator.commands import jobs
from rayprune.specs.errors import SpecError
from tests.conftest import MakeJob, MakeModel

ROOT = Path(__file__).parents[2]


def shell(line: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command line of `rayprune` with bash; its exit codes are the last line."""
    run = f"{sys.executable} -m rayprune.orchestrator.cli"
    line = line.format(*words, rayprune=run) + '; echo "${{PIPESTATUS[@]}}"'.format()
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("{rayprune} schema | head -1", "0 0"),
        ("{rayprune} schema >&-", "0"),
        ("{rayprune} --help >&- 2>&-", "0"),
        ("{rayprune} schema > /dev/full", "4"),
        ("{rayprune} validate /nothing 2>&-", "2"),
    ],
)
def test_commands(line: str, codes: str) -> None:
    done = shell(line)
    assert done.stdout.splitlines()[-1] == codes
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_whose_reader_leaves_ends_with_its_report(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, out = make_job(make_model(num_hidden_layers=1)), tmp_path / "run"
    done = shell("{rayprune} run {} --out {} 2>&1 | head -1", job, out)
    assert done.stdout.splitlines()[-1] == "0 0"
    assert (out / "report.json").exists()


def test_a_complaint_that_nobody_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(_: object) -> None:
        raise SpecError("wrong")

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as deaf:
        monkeypatch.setattr(jobs, "_validate", command)
        monkeypatch.setattr(sys, "stderr", deaf)
        assert cli.main(["validate", "job.yaml"]) == 2
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.mark.slow
def test_nothing_is_written_outside(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """A home folder that cannot be written, or that there is not, is not missed."""
    job, out = make_job(make_model(), budget={"per_layer": True}), tmp_path / "run"
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    environment = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    words = [sys.executable, "-m", "rayprune.orchestrator.cli", "run", str(job), "--out", str(out)]
    for home in ({"HOME": str(tmp_path)}, {"HOME": "/proc/nothing"}, {}):
        done = subprocess.run(
            words, cwd=ROOT, env=environment | home, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert {path for path in tmp_path.rglob("*") if out not in path.parents} == before | {out}
