"""An interrupt ends a command wherever it strikes, in a finalizer too: Python throws away what
these raise.
"""

import errno
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from rayprune.orchestrator import cli
from rayprune.orchestrator.commands import jobs
from rayprune.specs.errors import INTERRUPTED
from rayprune.workers.store.layout import task_folder
from tests.conftest import MakeJob, MakeModel
from tests.faults.conftest import Record
from tests.faults.reliability import Row


class Connection:
    """Something that is closed when it is no longer used."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/texts/a.txt"),
            2,
            "/texts/a.txt: Permission denied",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            4,
            "No space left on device; finished tasks are kept",
        ),
        (OSError("a socket's"), 1, "Traceback"),
    ],
)
def test_what_the_machine_refuses_has_an_exit_code(
    error: OSError,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(_: object) -> None:
        raise error

    monkeypatch.setattr(jobs, "_validate", command)
    assert cli.main(["validate", "job.yaml"]) == code
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_ctrl_c_in_a_training_on_ray(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, record: Record
) -> None:
    row = Row("cluster", "ranks on Ray", "Ctrl-C in a training", "exit code 130", "goes on later")
    record(row)
    training = {"epochs": 200, "batch": 2, "checkpoint_steps": 1000}
    job = make_job(make_model(), recover=training, cluster={"executor": "ray", "address": "local"})
    words = [
        sys.executable,
        "-m",
        "rayprune.orchestrator.cli",
        "run",
        str(job),
        "--out",
        str(tmp_path / "run"),
    ]
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    log = task_folder(tmp_path / "run", "recover") / "training.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, complaint = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED, complaint
    assert "run the same command again" in complaint


def test_an_interrupt_inside_a_finalizer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []

    def command(_: object) -> None:
        connection = Connection()
        weakref.finalize(connection, signal.raise_signal, signal.SIGTERM)
        del connection
        time.sleep(300)  # or until the interrupt
        ended.append("undisturbed")

    monkeypatch.setattr(jobs, "_run", command)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    assert cli.main(["run", "job.yaml", "--out", "run"]) == INTERRUPTED
    assert not ended
    assert "run the same command again" in capfd.readouterr().err
