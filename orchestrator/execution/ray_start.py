"""How Ray begins: a private one on this machine, or a cluster's. What keeps it from that is found
within the job's limits, and is told with what to do about it.
"""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import psutil
import ray
from ray._private import services

from rayprune.specs.cluster import ClusterSpec
from rayprune.specs.errors import ResourceError, SpecError, one_line

SOCKET_BYTES = 107
"""Longest path of a socket that Linux takes."""
SESSION_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
RETRY_SECONDS = 1.0
MOST_ENDS = 3
"""How often a start is tried in which a process of Ray's ends."""
_END_WITH_DRIVER = """
import os, sys
sys.stdin.read()
for word in sys.argv[1:]:
    pid, _, start = word.partition(":")
    try:
        with open(f"/proc/{pid}/stat") as stat:
            same = stat.read().rpartition(")")[2].split()[19] == start
        if same:
            os.kill(int(pid), 9)
    except OSError:
        pass
"""
"""Waits until nobody holds the other end of its pipe, then ends these processes."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def check_reachable(host: str, port: int, problem: str, seconds: float) -> None:
    """Fail at once where nobody listens; Ray itself would wait for minutes.

    Raises:
        ResourceError: nothing answers there; it begins with `problem`.
    """
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except (OSError, UnicodeError) as error:
        raise ResourceError(
            f"{problem}: cannot connect: {error}; is the head node up, and this its port?"
        ) from None


def begin(cluster: ClusterSpec, num_cpus: int) -> None:
    """Start a private Ray with so many CPUs, or connect to the job's cluster.

    Raises:
        SpecError: the address is none of a cluster's head node.
        ResourceError: it does not start, or does not answer, within the job's limits.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if cluster.address == "local":
        _start_local(cluster.start_seconds, num_cpus)
    else:
        _connect(cluster)
    if handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init replaces it, in the main thread


class _ProcessEndedError(Exception):
    """A process of Ray's has ended while the others wait for it."""


def _start_local(seconds: float, num_cpus: int) -> None:
    # a worker, and what a node starts with, may take as long as everything together
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(math.ceil(seconds)))
    os.environ.setdefault("RAY_agent_register_timeout_ms", str(math.ceil(seconds * 1000)))
    folder, deadline, ended = temporary_folder(), time.monotonic() + seconds, 0
    while True:
        others = _children()
        try:
            with _patient(deadline, others):
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    _temp_dir=folder,
                    **QUIET,
                )
            _end_with_driver(_children() - others)
            return
        except BaseException as error:  # Ray has no class of its own for what keeps it from it
            has_ended = _has_ended(others)
            ended += has_ended
            again = ended < MOST_ENDS if has_ended else _took_too_long(error)
            ray.shutdown()
            _end(_children() - others)
            if not isinstance(error, Exception):
                raise
            if not again or time.monotonic() >= deadline:
                raise _not_started(error, folder) from None
        time.sleep(RETRY_SECONDS)


def _not_started(error: Exception, folder: str | None) -> ResourceError:
    place = Path(folder or f"{os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()}/ray")
    cause = "; ".join(filter(None, [one_line(error), *_last_words(place)]))
    return ResourceError(
        f"cluster.address: local: Ray does not start on this machine: {cause}; on a slow or busy"
        " machine raise cluster.start_seconds, else free memory or disk, or raise the limits that"
        f" `ulimit -a` shows; Ray's logs are below {place}; cluster.executor: in-process needs no"
        " Ray"
    )


def _last_words(place: Path) -> Iterator[str]:
    """What Ray's own processes have written before they gave up."""
    for name in ("gcs_server.out", "raylet.out"):
        with suppress(OSError):
            log = (place / "session_latest" / "logs" / name).read_text(errors="replace")
            fatal = [line for line in log.splitlines() if " C " in line[:60]]
            yield from (line.rpartition("Check failed: ")[2][:300] for line in fatal[:1])


def _took_too_long(error: BaseException) -> bool:
    """Whether time was the cause; the machine's own refusals have numbers."""
    if isinstance(error, OSError) and error.errno is not None:
        return False
    return isinstance(error, TimeoutError) or any(
        words in str(error).lower() for words in ("timed out", "timeout", "failed to start gcs")
    )


@contextmanager
def _patient(deadline: float, others: set[psutil.Process]) -> Iterator[None]:
    """Ray gives a node 30 s to come up, and has no option for it: ask until the deadline, or until
    a process of it has ended, as those do that have waited too long for another one.
    """
    asked: Callable[..., Any] = services.get_node

    def get_node(*arguments: Any) -> Any:
        while True:
            try:
                return asked(*arguments)
            except RuntimeError:
                if _has_ended(others):
                    raise _ProcessEndedError("a process of it has ended") from None
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.1)

    with mock.patch.object(services, "get_node", get_node):
        yield


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _has_ended(others: set[psutil.Process]) -> bool:
    """Whether a child beside these has ended already: then waiting does not help."""
    for process in _children() - others:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
    return False


def _end(processes: set[psutil.Process]) -> None:
    """What a failed attempt has left would take the next one's time."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=RETRY_SECONDS)


def _end_with_driver(processes: set[psutil.Process]) -> None:
    """Let none of these outlive this process, however it ends: by themselves Ray's agents, one of
    which listens on all interfaces, need a minute to notice.
    """
    words = []
    for process in processes:
        with suppress(OSError):
            stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
            words.append(f"{process.pid}:{stat.rpartition(')')[2].split()[19]}")
    _watching.append(
        subprocess.Popen(  # its pipe is closed when this process ends
            [sys.executable, "-I", "-S", "-c", _END_WITH_DRIVER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )


_watching: list[subprocess.Popen[bytes]] = []


def end() -> None:
    """End the private Ray, or the connection, and what watches over its processes."""
    ray.shutdown()
    while _watching:
        _watching.pop().communicate()


def temporary_folder() -> str | None:
    """Where a private Ray keeps sockets and logs: None for its own choice, or a folder with a
    shorter path where its sockets would not fit, or one that can be written.

    Raises:
        ResourceError: there is none.
    """
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if _takes_sockets(chosen, "ray"):
        return None
    own = f"ray-{os.getuid()}"
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        if _takes_sockets(folder, own):
            return f"{folder}/{own}"
    raise ResourceError(
        f"{chosen}: Ray cannot keep its sockets here: a path of at most"
        f" {SOCKET_BYTES - SESSION_BYTES} bytes that can be written is needed, and /tmp, /var/tmp"
        " and /dev/shm are none; set TMPDIR to one, or cluster.executor: in-process"
    )


def _takes_sockets(folder: str, name: str) -> bool:
    below = Path(folder, name)
    place = below if below.exists() else Path(folder)
    fits = len(os.fsencode(folder)) + len(name) - len("ray") + SESSION_BYTES <= SOCKET_BYTES
    return fits and place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _connect(cluster: ClusterSpec) -> None:
    address, problem = cluster.address, f"cluster.address {cluster.address!r}"
    if address == "auto" and (named := os.environ.get("RAY_ADDRESS")):
        address, problem = named, f"{problem} (RAY_ADDRESS is {named!r})"
    if address != "auto":
        host, port = _parted(address, problem)
        check_reachable(host, port, problem, cluster.connect_seconds)
    address = _answering(address, cluster.connect_seconds, problem)
    try:
        ray.init(address=address, **QUIET)
    except Exception as error:  # Ray has no class of its own for what keeps it from connecting
        ray.shutdown()
        raise ResourceError(
            f"{problem}: cannot connect: {one_line(error)}; the driver needs a node of the cluster"
            " under it, the cluster's token, and the same versions of Python and Ray"
        ) from None


def _parted(address: str, problem: str) -> tuple[str, int]:
    """Host and port of a head node.

    Raises:
        SpecError: it is not the address of one.
    """
    with suppress(ValueError):
        parts = urlsplit(f"//{address}")
        if "://" not in address and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise SpecError(
        f"{problem}: {address!r} is no HOST:PORT of a head node (port 6379, unless it was started"
        " with another); from outside a cluster use `rayprune submit`"
    )


def _answering(address: str, seconds: int, problem: str) -> str:
    """The address at which the cluster's head node has answered in time."""
    words = [sys.executable, "-P", "-m", "rayprune.orchestrator.execution.ray_probe"]
    words += [address]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        answer: dict[str, str] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {
            "problem": f"no head node of a Ray cluster has answered within"
            f" {seconds} s (cluster.connect_seconds)"
        }
    except ValueError:
        answer = {"problem": (done.stderr.strip().splitlines() or ["Ray ended at once"])[-1]}
    if "address" in answer:
        return answer["address"]
    raise ResourceError(
        f"{problem}: cannot connect: {answer['problem']}; is the head node up, and this its port?"
        " `cluster.address: local` starts a private Ray"
    )
