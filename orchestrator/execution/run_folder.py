"""The run folder: one writer at a time, the job it was last run with, and what is finished.

Every finished task says what it was made from. A task that was made from other options or inputs is
stale: it is done again. Where other software made it, going on would mix roundings, and is refused
unless asked for.
"""

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from rayprune.specs.errors import SpecError, VerificationError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import differences, dump_job, load_job, paths_in
from rayprune.workers.machine.shortage import is_disk_full
from rayprune.workers.store.files import Manifest, Task, write_text
from rayprune.workers.store.layout import (
    CACHE,
    EVENTS_FILE,
    EXPORTS,
    JOB_FILE,
    LOCK_FILE,
    PLAN_FILE,
    TASKS,
    Scope,
    model_folder,
)
from rayprune.workers.store.logs import EventLine, read_lines
from rayprune.workers.store.out import check_out
from rayprune.workers.store.plain import check_plain, remove_temporaries

CODE_VERSION = 13
"""Raised whenever the same job would give other bytes."""
REPORT_FILE, PAGE_FILE, BENCH_FILE = "report.json", "report.html", "bench.json"
HOW_COMPUTED = ("model.dtype", "parallel.device")
"""Options that say on what kind of device and in which type workers compute."""
_version = cache(version)
NUMERIC_PACKAGES = ("torch", "transformers", "numpy", "scipy", "safetensors")


def environment() -> dict[str, str]:
    """What besides the job decides the bits of a result."""
    return {name: _version(name) for name in NUMERIC_PACKAGES} | {
        "machine": platform.machine(),
        "code": str(CODE_VERSION),
    }


class RunFolder:
    """An opened, locked run folder."""

    def __init__(self, path: Path, job: JobSpec, redo_stale: bool = False) -> None:
        """With `redo_stale`, what other software has made is done again, not refused."""
        self.path, self.job, self.redo_stale = Path(os.path.abspath(path)), job, redo_stale
        self._environment = environment()
        self._start = time.monotonic()
        self._lock = FileLock(self.path / LOCK_FILE, timeout=0)

    def __enter__(self) -> Self:
        """Lock the folder, remove what dead attempts have left half-written, and write the job
        down.

        Raises:
            SpecError: it is in use, no run folder, not writable, or holds what leads out of it or
                what the job reads.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            check_out(self.path, paths_in(self.job).values())
            self._check_parts()
            self._lock.acquire()
        except Timeout:
            raise SpecError(
                f"{self.path}: another run is writing here; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            if is_disk_full(error):
                raise
            raise SpecError(f"{self.path}: cannot be used as the run folder: {error}") from None
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            remove_temporaries(self.path)
            self._write_job()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check_parts(self) -> None:
        """Check that what is there is what a run leaves: another's links would be written through,
        or read from.

        Raises:
            SpecError: it is not.
        """
        check_plain(
            self.path, "a run folder holds none: remove it from there, or choose another --out"
        )
        folders = CACHE, TASKS, EXPORTS
        for part in (*(self.path / name for name in folders), model_folder(self.path)):
            if part.exists() and not part.is_dir():
                raise SpecError(f"{part}: is no folder; remove it, or choose another --out")
        for name in (JOB_FILE, EVENTS_FILE, PLAN_FILE, REPORT_FILE, PAGE_FILE, BENCH_FILE):
            if (self.path / name).is_dir():
                raise SpecError(
                    f"{self.path / name}: is a folder; remove it, or choose another --out"
                )

    def _write_job(self) -> None:
        path, text = self.path / JOB_FILE, dump_job(self.job)
        if path.exists() and dump_job(load_job(path)) != text:
            forget_report(self.path)  # it is of another job
        write_text(path, text)
        events = self.path / EVENTS_FILE
        if events.exists() and not events.read_bytes().endswith(b"\n"):
            with events.open("ab") as handle:
                # end a line that a crash has torn, so that it does not swallow the next one
                handle.write(b"\n")

    def emit(self, event: dict[str, Any]) -> None:
        """Append an event to events.jsonl."""
        now = {"time": time.time(), "elapsed": time.monotonic() - self._start}
        with (self.path / EVENTS_FILE).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(now | event) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events of all attempts; a line that is none is left out."""
        return read_events(self.path)

    def task(
        self,
        name: str,
        scope: Scope,
        options: Mapping[str, object],
        inputs: Mapping[str, object],
        computed_on: str | None = None,
    ) -> Task:
        """A task whose result depends on these options and inputs, on the software, and, where it
        computes with activations, on how.
        """
        made_from = {
            "environment": self._environment,
            "computed_on": computed_on,
            "options": options,
            "inputs": inputs,
        }
        # as it is read again
        return Task(name, scope.folder(name), json.loads(json.dumps(made_from)))

    def changes(self, found: Manifest, wanted: Task) -> list[str]:
        """In what a finished task differs from the one that is wanted, as lines; none: it is that
        one.

        Raises:
            VerificationError: other software or another kind of device has made it, and it shall
                not be redone for that.
        """
        old, new = found.made_from, wanted.made_from
        if old == new and found.fingerprint == wanted.fingerprint:
            return []
        moved = old.get("computed_on") != new["computed_on"] and not _asked(old, new)
        if not self.redo_stale and (moved or old.get("environment") != new["environment"]):
            what = "; ".join(_differences(old, new, "environment", "computed_on"))
            raise VerificationError(
                f"{wanted.folder}: was made by other software or on another kind of device: {what};"
                " take that back, choose another --out, or do again what depends on it:"
                " rayprune run --redo stale"
            )
        parts = "environment", "computed_on", "options", "inputs"
        return _differences(old, new, *parts) or [f"it is the record of {found.task}"]


def _asked(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the job itself says that it is to be computed in another way."""
    return any(
        old.get("options", {}).get(name) != new["options"].get(name) for name in HOW_COMPUTED
    )


def _differences(old: Mapping[str, object], new: Mapping[str, object], *parts: str) -> list[str]:
    """Lines of what differs: options and inputs by their own names."""
    lines: list[str] = []
    for part in parts:
        name = "" if part in ("options", "inputs") else part
        lines += differences(old.get(part) or {}, new[part] or {}, name)
    return [re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", line) for line in lines]


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run folder; a line that is none (torn by a crash, or odd) is left out."""
    return read_lines(path / EVENTS_FILE, EventLine)


def seconds_per_stage(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Time spent in each stage over all attempts, in seconds; an attempt that was cut off counts up
    to its last event. Never negative, whatever the machine's clock did.
    """
    seconds: dict[str, float] = {}
    stage, since = None, 0.0
    for index, event in enumerate(events):
        if event["event"] == "stage-started":
            stage, since = event.get("stage"), _clock(event)
        following = events[index + 1]["event"] if index + 1 < len(events) else "run-started"
        if stage and (event["event"] == "stage-finished" or following == "run-started"):
            seconds[stage] = seconds.get(stage, 0.0) + max(0.0, _clock(event) - since)
            stage = None
    return seconds


def _clock(event: Mapping[str, Any]) -> float:
    """Seconds within an attempt; the first versions wrote down the machine's clock alone."""
    return float(event.get("elapsed", event["time"]))


def forget_report(run: Path) -> None:
    """Remove a report of what is about to be done again."""
    for name in (REPORT_FILE, PAGE_FILE):
        (run / name).unlink(missing_ok=True)
