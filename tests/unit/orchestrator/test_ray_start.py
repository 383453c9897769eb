"""How Ray begins: what keeps it from that is found in time, and told with what to do."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rayprune.orchestrator.execution import ray_start
from rayprune.orchestrator.execution.ray_start import begin, one_line, temporary_folder
from rayprune.specs.cluster import ClusterSpec
from rayprune.specs.errors import ResourceError, SpecError

SLOW = "The current node timed out during startup. This could happen because"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here starts a Ray, or ends another test's."""
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_start, "_end_with_driver", lambda _: None)
    monkeypatch.setattr(ray_start, "RETRY_SECONDS", 0.0)


def starts(monkeypatch: pytest.MonkeyPatch, *outcomes: BaseException | None) -> list[Any]:
    """Let `ray.init` end so, one after another; the arguments that it was given."""
    given: list[Any] = []

    def init(**options: Any) -> None:
        given.append(options)
        if outcome := outcomes[len(given) - 1]:
            raise outcome

    monkeypatch.setattr(ray, "init", init)
    return given


def test_a_slow_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = starts(monkeypatch, Exception(SLOW), RuntimeError("Failed to start GCS."), None)
    begin(ClusterSpec(), 2)
    assert [options["num_cpus"] for options in given] == [2, 2, 2]


def test_a_start_that_stays_slow_ends_at_the_jobs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    starts(monkeypatch, *[Exception(SLOW)] * 2)
    now = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(ray_start.time, "monotonic", lambda: next(now))
    with pytest.raises(ResourceError, match=r"timed out.*raise cluster\.start_seconds"):
        begin(ClusterSpec(start_seconds=1), 2)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/tmp/ray"), ValueError("num_cpus")]
)
def test_what_waiting_does_not_change_is_tried_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = starts(monkeypatch, error)
    with pytest.raises(ResourceError, match=r"cluster\.address: local: Ray does not start"):
        begin(ClusterSpec(), 2)
    assert len(given) == 1


def test_what_a_failed_start_leaves_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def init(**_: Any) -> None:
        left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        begin(ClusterSpec(), 2)
    # 0 where psutil has waited for it first
    assert left[0].wait(5) in (-signal.SIGKILL, 0)


def test_a_long_path_for_sockets_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(ray_start.tempfile, "gettempdir", lambda: "/tmp")
    assert temporary_folder() is None
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(ray_start.tempfile, "gettempdir", lambda: str(long))
    folder = temporary_folder()
    assert folder == f"/tmp/ray-{os.getuid()}"
    session = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert len(f"{folder}/{session}") <= ray_start.SOCKET_BYTES
    monkeypatch.setattr(ray_start, "_takes_sockets", lambda *_: False)
    with pytest.raises(ResourceError, match=r"at most \d+ bytes.*set TMPDIR"):
        temporary_folder()


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", "host:port", "[::1"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(SpecError, match=r"cluster\.address .* is no HOST:PORT"):
        begin(ClusterSpec(address=address), 2)


def test_a_ray_address_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"RAY_ADDRESS is '127\.0\.0\.1:1'.*refused"):
        begin(ClusterSpec(address="auto", connect_seconds=60), 2)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of somebody who listens and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.slow
def test_somebody_else_listens(silent: int) -> None:
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"answered within 2 s \(cluster\.connect_seconds\)"):
        begin(ClusterSpec(address=f"127.0.0.1:{silent}", connect_seconds=2), 2)
    assert time.monotonic() - start < 10


def test_versions_that_differ_are_both_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.9\nThis process:\n    Ray: 3"
    )
    starts(monkeypatch, RuntimeError(words))
    monkeypatch.setattr(ray_start, "check_reachable", lambda *_: None)
    monkeypatch.setattr(ray_start, "_answering", lambda *_: "127.0.0.1:6379")
    with pytest.raises(ResourceError, match=r"Ray: 2\.9; This process:; Ray: 3; .*same versions"):
        begin(ClusterSpec(address="127.0.0.1:6379"), 2)


def test_one_line_leaves_tracebacks_out() -> None:
    assert one_line(RuntimeError("a\n\n b.\nTraceback (most recent call last)\n  File")) == "a; b."
    assert one_line(KeyError()) == "KeyError"


def test_processes_end_with_the_driver() -> None:
    """The watcher ends them when the process that started it is gone, however it went."""
    script = (
        "import subprocess, sys, psutil, os\n"
        "from rayprune.orchestrator.execution import ray_start\n"
        "words = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "child = subprocess.Popen(words, start_new_session=True)\n"
        "ray_start._end_with_driver({psutil.Process(child.pid)})\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
