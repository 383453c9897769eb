"""What the tests of faults share: undisturbed runs, and the table of what was tried, which
`--reliability FILE` writes when the tests have ended.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.faults.calm import Calm, calm_run
from tests.faults.reliability import Row, page

settings.register_profile("fast", max_examples=15, deadline=None, database=None, derandomize=True)
settings.register_profile("faults", max_examples=300, deadline=None, database=None)
settings.load_profile("fast")

Record = Callable[[Row], None]


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Note a fault that was tried, for docs/reliability.md."""
    return lambda row: record_property("fault", row.as_json())


MakeCalm = Callable[[str], Calm]


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> MakeCalm:
    """The undisturbed run of a kind of job, made once."""
    made: dict[str, Calm] = {}

    def make(name: str) -> Calm:
        if name not in made:
            made[name] = calm_run(tmp_path_factory.mktemp("calm"), text_file, name)
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
