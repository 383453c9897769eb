"""The run folder: one job, one writer at a time, and the record of what is finished.

A folder belongs to the job that first wrote to it. Fields the result does not depend on (workers,
cluster, memory, evaluation) may change between attempts; any other difference is an error.
"""

import json
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from rayprune.specs.errors import SpecError, VerificationError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import differing_fields, dump_job, load_job
from rayprune.workers.store.files import (
    Manifest,
    damaged_files,
    fingerprint,
    read_manifest,
    write_text,
)
from rayprune.workers.store.layout import CACHE, task_folder

CODE_VERSION = 3
"""Raised whenever the same job would give other bytes."""
JOB_FILE, EVENTS_FILE, PLAN_FILE, LOCK_FILE = "job.yaml", "events.jsonl", "plan.json", "run.lock"
REPORT_FILE, PAGE_FILE = "report.json", "report.html"
NUMERIC_PACKAGES = ("torch", "transformers", "numpy", "scipy", "safetensors")


def environment() -> dict[str, str]:
    """What besides the job decides the bits of a result."""
    return {name: version(name) for name in NUMERIC_PACKAGES} | {
        "machine": platform.machine(),
        "code": str(CODE_VERSION),
    }


class RunFolder:
    """An opened, locked run folder."""

    def __init__(self, path: Path, job: JobSpec) -> None:
        self.path, self.job = path.absolute(), job
        self._lock = FileLock(self.path / LOCK_FILE, timeout=0)

    def __enter__(self) -> Self:
        """Lock the folder and bind it to the job.

        Raises:
            SpecError: it is another job's, in use, no run folder, or not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strange = [
                item
                for item in self.path.iterdir()
                if item.name != LOCK_FILE and item.suffix != ".tmp"
            ]
            if strange and not (self.path / JOB_FILE).exists():
                raise SpecError(
                    f"{self.path}: is not empty and holds no {JOB_FILE}; --out must name a new"
                    " folder or an earlier run"
                )
            self._lock.acquire()
        except Timeout:
            raise SpecError(
                f"{self.path}: another run is writing here; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise SpecError(f"{self.path}: cannot be used as the run folder: {error}") from None
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            self._bind()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _bind(self) -> None:
        path = self.path / JOB_FILE
        if path.exists() and (changes := differing_fields(load_job(path), self.job)):
            raise SpecError(
                f"{self.path}: belongs to another job; choose another --out, or take back: "
                + "; ".join(changes)
            )
        write_text(path, dump_job(self.job))
        events = self.path / EVENTS_FILE
        if events.exists() and not events.read_bytes().endswith(b"\n"):
            with events.open("ab") as handle:
                # end a line that a crash has torn, so that it does not swallow the next one
                handle.write(b"\n")

    def emit(self, event: dict[str, Any]) -> None:
        """Append an event to events.jsonl."""
        with (self.path / EVENTS_FILE).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"time": time.time()} | event) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events of all attempts; a line torn by a crash is left out."""
        return read_events(self.path)

    def fingerprint(self, task: str, *inputs: str, part: object = None) -> str:
        """What a task's result depends on: the job (or the given part of it), the software, and its
        inputs' digests.
        """
        spec = self.job.result_part() if part is None else part
        return fingerprint(
            {"task": task, "spec": spec, "environment": environment(), "inputs": list(inputs)}
        )

    def finished(self, task: str, expected: str, redo_stale: bool = False) -> Manifest | None:
        """The manifest of a task that is done; None when it has to be done (again, if its files are
        damaged).

        With `redo_stale` a task that was done from other inputs has to be done again; otherwise
        that is an error.

        Raises:
            VerificationError: the task was done from other inputs or by other software.
        """
        folder = task_folder(self.path, task)
        manifest = read_manifest(folder)
        if manifest is None or damaged_files(folder, manifest):
            return None
        if manifest.fingerprint != expected and redo_stale:
            return None
        if manifest.fingerprint != expected:
            raise VerificationError(
                f"{folder}: was made from other inputs (model, text) or by other package versions"
                f" (now {_versions()}); choose another --out, or delete {folder} and"
                f" {self.path / CACHE}"
            )
        return manifest


def _versions() -> str:
    return ", ".join(f"{name} {number}" for name, number in environment().items())


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run folder; a line torn by a crash is left out."""
    file = path / EVENTS_FILE
    events = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def seconds_per_stage(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Time spent in each stage over all attempts, in seconds; an attempt that was cut off counts up
    to its last event.
    """
    seconds: dict[str, float] = {}
    stage, since = None, 0.0
    for index, event in enumerate(events):
        if event["event"] == "stage-started":
            stage, since = event["stage"], event["time"]
        following = events[index + 1]["event"] if index + 1 < len(events) else "run-started"
        if stage and (event["event"] == "stage-finished" or following == "run-started"):
            seconds[stage] = seconds.get(stage, 0.0) + event["time"] - since
            stage = None
    return seconds


def forget_report(run: Path) -> None:
    """Remove a report of what is about to be done again."""
    for name in (REPORT_FILE, PAGE_FILE):
        (run / name).unlink(missing_ok=True)
