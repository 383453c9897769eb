"""A cluster on this machine, its drivers and workers, and how far a run is."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.conftest import folder_bytes
from tests.faults.forks import attempt

TOKEN = os.environ["RAY_AUTH_TOKEN"].encode()


@dataclass
class Bench:
    """A cluster, a job, and the bytes of the model that comes of it by placement."""

    folder: Path
    cluster: Cluster
    nodes: list[Any]
    expected: dict[str, dict[str, bytes]] = field(default_factory=dict)
    is_gone: bool = False
    """Whether the cluster's head has been killed."""

    def command(self, out: Path, *sets: str, address: str | None = None) -> list[str]:
        """The command line of a driver."""
        words = [sys.executable, "-m", "rayprune.orchestrator.cli", "run"]
        words += [str(self.folder / "job.yaml"), "--out", str(out)]
        fixed = ("cluster.executor=ray", f"cluster.address={address or self.cluster.address}")
        return [*words, *(word for each in (*fixed, *sets) for word in ("--set", each))]

    def driver(self, out: Path, *sets: str, **options: Any) -> "subprocess.Popen[str]":
        """A driver in a process of its own."""
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.command(out, *sets, **options), **pipes)

    def of(self, placement: str) -> dict[str, bytes]:
        """The bytes of an undisturbed run in one process."""
        if placement not in self.expected:
            out = self.folder / f"calm-{placement}"
            sets = ["--set", f"parallel.placement={placement}"]
            words = ["run", str(self.folder / "job.yaml"), "--out", str(out), *sets]
            assert attempt(words).code == 0
            self.expected[placement] = folder_bytes(out / "model")
        return self.expected[placement]

    def replace(self, node: Any) -> None:
        """A node goes as in a loss of power, and another one comes."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        self.nodes.append(self.cluster.add_node(num_cpus=1))


def processes(beginning: bytes) -> list[int]:
    """Processes of this session's Ray whose command line begins so."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = TOKEN in (process / "environ").read_bytes()
            if ours and beginning in (process / "cmdline").read_bytes()[:400]:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def workers() -> list[int]:
    return processes(b"ray::Worker")


def until(condition: Callable[[], bool], driver: "subprocess.Popen[str]", what: str) -> None:
    """Wait for something while a driver runs."""
    deadline = time.monotonic() + 240
    while not condition():
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            raise AssertionError(f"{what} never came: {driver.communicate()[0]}")
        time.sleep(0.02)


def in_mid_run(out: Path, placement: str, driver: "subprocess.Popen[str]") -> None:
    """Wait until layers are done (`shards`), or micro-batches flow (`layers`)."""
    if placement == "shards":
        done = out / "tasks" / "layer-0002" / "manifest.json"
        until(done.exists, driver, "layer 2")
    else:
        until(lambda: "micro-batches" in log(out), driver, "the first micro-batches")


def log(out: Path) -> str:
    file = out / "events.jsonl"
    return file.read_text() if file.exists() else ""


def failures(out: Path) -> list[str]:
    lines = [json.loads(line) for line in log(out).splitlines()]
    return [line["task"] for line in lines if line["event"] == "worker-failed"]


def ended(driver: "subprocess.Popen[str]", seconds: float = 240) -> str:
    """What a driver has printed, once it has ended."""
    try:
        return driver.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        driver.kill()
        raise AssertionError(f"it did not end: {driver.communicate()[0]}") from None
