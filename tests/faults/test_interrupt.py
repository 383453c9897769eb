"""An interrupt ends a command wherever it strikes, in a finalizer too: Python throws away what these raise."""

import signal
import sys
import time
import weakref

import pytest

from orchestrator import cli
from specs.errors import INTERRUPTED


class Connection:
    """Something that is closed when it is no longer used."""


def test_an_interrupt_inside_a_finalizer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def command(_: object) -> None:
        connection = Connection()
        weakref.finalize(connection, signal.raise_signal, signal.SIGTERM)
        del connection
        time.sleep(20)

    monkeypatch.setattr(cli, "_validate", command)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    start = time.monotonic()
    assert cli.main(["validate", "job.yaml"]) == INTERRUPTED
    assert time.monotonic() - start < 10
    assert "run the same command again" in capfd.readouterr().err
