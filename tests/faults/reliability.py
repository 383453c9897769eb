"""docs/reliability.md: what was tried, as the run that tried it has noted it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

SECTIONS = {
    "crash": (
        "The process dies",
        "A hook kills the process (SIGKILL) before every operation on files that follows a change,"
        " and in the middle of writing a file or a line; the same command again ends the job. `N`"
        " stands for a number, `*` for a digest.",
        ("job", "file or folder", "killed when"),
    ),
    "machine": (
        "The machine refuses",
        "Disk, memory, signals, the clock.",
        ("job", "fault", "what is seen"),
    ),
    "cluster": (
        "Ray and its cluster",
        "With real Ray processes: workers, nodes, heads, drivers.",
        ("where", "fault", "what is seen"),
    ),
    "damage": (
        "Files of a run are damaged",
        "Done to a finished or half-finished run folder; then `run` goes on, or `verify` looks.",
        ("file", "damage", "what is seen"),
    ),
    "input": (
        "The input is wrong",
        "Jobs, command lines, models and texts that will not do.",
        ("command", "input", "what is said"),
    ),
    "hostile": (
        "Folders of somebody who means harm",
        "Nothing of theirs runs, nothing outside is read into the model or written.",
        ("folder", "attempt", "what is seen"),
    ),
}
HEAD = """# Reliability

Written by `make test-faults`, which tries all of this; do not edit. *Bytes equal*: the pruned
model, and the recovered one, have the bytes of an undisturbed run, and the report its numbers.
[Security](security.md) says what is not protected.
"""


@dataclass(frozen=True)
class Row:
    """One fault, tried `times`, and what came of it."""

    section: str
    first: str
    second: str
    third: str
    outcome: str
    times: int = 1
    bytes_equal: bool | None = None
    """Whether the result was that of an undisturbed run; None: there was none to compare."""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, passed: bool) -> "Row":
        row = cls(**json.loads(text))
        return row if passed else replace(row, outcome="**the test failed**")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _equal(value: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[value]


def _table(section: str, rows: Sequence[Row]) -> str:
    title, about, columns = SECTIONS[section]
    lines = [f"## {title}", "", about, ""]
    lines.append("| " + " | ".join([*columns, "times", "outcome", "bytes equal"]) + " |")
    lines.append("|---|---|---|--:|---|---|")
    for row in sorted(rows, key=lambda row: (row.first, row.second, row.third)):
        cells = [row.first, row.second, row.third, str(row.times), row.outcome]
        cells.append(_equal(row.bytes_equal))
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Mapping[str, Sequence[Row]]) -> str:
    """The whole document."""
    counts = ["| what | kinds | times |", "|---|--:|--:|"]
    for section in SECTIONS:
        some = rows.get(section, [])
        times = sum(row.times for row in some)
        counts.append(f"| {SECTIONS[section][0]} | {len(some)} | {times} |")
    tables = [_table(section, rows[section]) for section in SECTIONS if rows.get(section)]
    return "\n".join([HEAD, "\n".join(counts) + "\n", *tables])
