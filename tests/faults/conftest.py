"""What the tests of faults share: jobs and their undisturbed runs, and the table of what was tried,
which `--reliability FILE` writes when the tests have ended.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import folder_bytes
from tests.faults.forks import attempt
from tests.faults.hooks import Count, Operation, counted
from tests.faults.kinds import command, prepare
from tests.faults.reliability import Row, page

Record = Callable[[Row], None]
MACHINE = {"seconds", "step_seconds", "peak_memory_bytes", "tokens_per_second"}
"""What two reports of the same job differ in."""


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Note a fault that was tried, for docs/reliability.md."""
    return lambda row: record_property("fault", row.as_json())


def numbers(report: object) -> object:
    """A report without what the machine's speed and size decide."""
    if isinstance(report, dict):
        return {key: numbers(value) for key, value in report.items() if key not in MACHINE}
    return [numbers(value) for value in report] if isinstance(report, list) else report


def result_of(run: Path) -> dict[str, Any]:
    """All that a user takes from a run: the models' bytes and the report's numbers."""
    models = [run / "model", run / "tasks" / "recover" / "model"]
    files = {f"{m.name}/{k}": v for m in models if m.exists() for k, v in folder_bytes(m).items()}
    return files | {"report": numbers(json.loads((run / "report.json").read_text()))}


@dataclass
class Calm:
    """A job, what came of it undisturbed, and its operations on files."""

    name: str
    job: Path
    run: Path
    expected: dict[str, Any]
    operations: list[Operation]

    def command(self, out: Path) -> list[str]:
        return command(self.job, out, self.name)

    def fresh(self) -> Path:
        """A run folder that is not there yet, and no store beside it."""
        out = self.run.with_name("disturbed")
        for folder in (out, out.with_name("disturbed-store")):
            shutil.rmtree(folder, ignore_errors=True)
        return out

    def copied(self) -> Path:
        """A copy of the finished run."""
        out = self.fresh()
        for folder in (self.run, self.run.with_name(self.run.name + "-store")):
            if folder.exists():
                beside = folder.name.removeprefix(self.run.name)
                shutil.copytree(folder, out.with_name(out.name + beside))
        return out


MakeCalm = Callable[[str], Calm]


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> MakeCalm:
    """The undisturbed run of a kind of job, made once."""
    made: dict[str, Calm] = {}

    def make(name: str) -> Calm:
        if name not in made:
            folder = tmp_path_factory.mktemp("calm")
            job, run = prepare(folder, text_file, name), folder / "run"
            ended = attempt(command(job, run, name), Count(run, folder / "operations"))
            assert ended.code == 0, ended.words
            made[name] = Calm(name, job, run, result_of(run), counted(folder / "operations"))
        return made[name]

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="write the table of faults to this file")


class Table:
    """Gathers what the tests have noted, from workers of xdist too."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, defaultdict[str, list[Row]](list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "fault":
                row = Row.from_json(str(value), passed=report.passed)
                self.rows[row.section].append(row)

    def pytest_sessionfinish(self) -> None:
        if self.rows:
            self.file.write_text(page(self.rows), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--reliability", default=None)
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(config.rootpath, file)), "table of faults")
