"""Undisturbed runs, to which disturbed ones are compared."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import folder_bytes
from tests.faults.forks import Ended, Fault, attempt
from tests.faults.hooks import Count, Operation, counted
from tests.faults.kinds import KINDS, command, prepare

MACHINE = {"seconds", "step_seconds", "peak_memory_bytes", "tokens_per_second", "finished"}
"""What two reports of the same job differ in."""
SEALS = {"records", "sha256"}
"""Digests in a report, of itself and of files that tell of the machine too."""


def numbers(report: object) -> object:
    """A report without what the machine's speed and size decide."""
    if isinstance(report, dict):
        return {key: numbers(value) for key, value in report.items() if key not in MACHINE}
    return [numbers(value) for value in report] if isinstance(report, list) else report


def result_of(run: Path) -> dict[str, Any]:
    """All that a user takes from a run: the models' bytes and the report's numbers."""
    models = [run / "model", run / "tasks" / "recover" / "model"]
    files = {f"{m.name}/{k}": v for m in models if m.exists() for k, v in folder_bytes(m).items()}
    report = json.loads((run / "report.json").read_text())
    told = {key: value for key, value in report.items() if key not in SEALS}
    return files | {"report": numbers(told)}


@dataclass
class Calm:
    """A job, what came of it undisturbed, and its operations on files."""

    name: str
    job: Path
    run: Path
    expected: dict[str, Any]
    operations: list[Operation]
    seconds: float

    def command(self, out: Path) -> list[str]:
        return command(self.job, out, self.name)

    def attempt(self, out: Path, *faults: Fault, **options: Any) -> Ended:
        """Run its command, after the faults."""
        return attempt(self.command(out), *KINDS[self.name].faults, *faults, **options)

    def fresh(self) -> Path:
        """A run folder that is not there yet, and no store beside it."""
        out = self.run.with_name("disturbed")
        for folder in (out, out.with_name("disturbed-store")):
            shutil.rmtree(folder, ignore_errors=True)
        return out

    def take(self, kept: Path) -> None:
        """Put a copied run folder, and the store beside it, in the place of a fresh one."""
        self.fresh()
        for folder in kept.iterdir():
            folder.rename(self.run.with_name(folder.name))

    def copied(self) -> Path:
        """A copy of the finished run."""
        out = self.fresh()
        for folder in (self.run, self.run.with_name(self.run.name + "-store")):
            if folder.exists():
                beside = folder.name.removeprefix(self.run.name)
                shutil.copytree(folder, out.with_name(out.name + beside))
        return out


def calm_run(folder: Path, text: Path, name: str) -> Calm:
    """Run a kind of job in a folder of its own, below this one."""
    place = folder / name.replace(", ", "-").replace(" ", "-")
    place.mkdir()
    job, run = prepare(place, text, name), place / "run"
    counting = Count(run, place / "operations")
    ended = attempt(command(job, run, name), *KINDS[name].faults, counting)
    if ended.code:
        raise AssertionError(f"{name}: {ended.words}")
    return Calm(name, job, run, result_of(run), counted(place / "operations"), ended.seconds)
