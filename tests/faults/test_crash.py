"""The process dies before every kind of operation on files, in every kind of job: the same command
again repeats nothing that was finished, and ends with the bytes of an undisturbed run.
"""

import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

from tests.faults.calm import Calm, result_of
from tests.faults.conftest import MakeCalm, Record
from tests.faults.hooks import DieAt, KeepAt, Operation, kept
from tests.faults.kinds import KINDS
from tests.faults.reliability import Row

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
PARTS = 3
"""Tests of one kind of job, so that two processes share its points."""
SEEN = {
    ("sync", False): "written, not synced",
    ("rename", True): "half written",
    ("remove", False): "renamed",
    ("append", True): "half a line",
}
"""What the process leaves that dies before an operation, or in the middle of it."""


def points(calm: Calm) -> Iterator[tuple[str, str, int, bool]]:
    """Where to die: place, what is left there, number of the operation, and whether half of it is
    done; each kind of operation on each kind of file once, in the middle of its occurrences, unless
    nothing has changed since the one before it. A file that is half written, and one that is not
    synced, both lie beside their place under another name: one of the two will do but in the first
    kind of job.
    """
    found = defaultdict[tuple[str, str], list[int]](list)
    for number, operation in enumerate(calm.operations):
        if re.search(KINDS[calm.name].own, operation.path):
            found[operation.where, operation.name].append(number)
    for (where, name), numbers in found.items():
        number = numbers[len(numbers) // 2]
        same = name == "sync" and calm.name != next(iter(KINDS))
        if not same and not (number and unchanging(calm.operations[number - 1])):
            yield where, SEEN.get((name, False), f"before {name}"), number, False
        if (name, True) in SEEN:
            yield where, SEEN[name, True], number, True


def unchanging(operation: Operation) -> bool:
    """Whether the files are the same after it; a temporary file that is removed has been renamed
    before.
    """
    return operation.name == "sync" or (
        operation.name == "remove" and operation.path.endswith(".tmp")
    )


def finished(run: Path) -> dict[Path, int]:
    """When the manifests of finished tasks were written."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.own != "^$"])
def test_a_process_dies(name: str, part: int, calm: MakeCalm, record: Record) -> None:
    """One process dies in truth; the others' folders are copied out of a run, which is what the
    system keeps of a process that is killed.
    """
    job, problems = calm(name), list[str]()
    met = defaultdict[str, list[str]](list)
    chosen = sorted(points(job))
    share = chosen[len(chosen) * part // PARTS : len(chosen) * (part + 1) // PARTS]
    copies = {(number, torn) for _, _, number, torn in share[1:]}
    out = job.fresh()
    kept_all = job.attempt(out, KeepAt(out, copies))
    assert kept_all.code == 0, kept_all.words
    for where, left, number, torn in share:
        met[where].append(left)
        if (number, torn) in copies:
            job.take(kept(out, number, torn))
        else:
            died = job.attempt(job.fresh(), DieAt(out, number, torn))
            assert died.code == -signal.SIGKILL, died
        if problem := after_death(job, out):
            problems.append(f"{job.operations[number]}, number {number}, torn {torn}: {problem}")
    for where, operations in met.items():
        words, seen = ", ".join(operations), "goes on, nothing done twice"
        record(Row("crash", name, where, words, seen, len(operations), bytes_equal=True))
    assert not problems, "\n".join(problems)


def after_death(job: Calm, out: Path) -> str:
    """What is wrong when the same command runs again after a crash."""
    before = finished(out)
    again = job.attempt(out)
    if again.code:
        return again.words
    after = finished(out)  # what steps have left goes behind the steps
    repeated = [path for path, written in before.items() if after.get(path, written) != written]
    if repeated:
        return f"finished tasks were done again: {repeated}"
    return "" if result_of(out) == job.expected else "another result"


def test_a_dead_attempt_leaves_nothing_behind(calm: MakeCalm, record: Record) -> None:
    """Its temporary files go when the command is run again."""
    job, left = calm("stat"), dict[str, list[str]]()
    places = {o.where: n for n, o in enumerate(job.operations) if o.name == "sync"}
    for where, number in places.items():
        out = job.fresh()
        job.attempt(out, DieAt(out, number))
        assert job.attempt(out).code == 0
        left[where] = [path.name for path in out.rglob("*") if path.name.endswith(".tmp")]
    row = Row("crash", "stat", "temporary files", "sync", "removed", len(places), bytes_equal=True)
    record(row)
    assert not any(left.values()), left


def test_files_are_on_the_disk_before_they_have_their_names(calm: MakeCalm, record: Record) -> None:
    """What a loss of power must not tear: a file is synced before it is renamed into place."""
    job = calm("stat")
    for number, operation in enumerate(job.operations):
        if operation.name == "rename":
            before = job.operations[number - 1]
            assert before.name == "sync", (before, operation)
            place = PurePath(operation.path)
            beginning = re.escape(str(place.with_name(f".{place.name}.")))
            assert re.fullmatch(beginning + r"[0-9a-f]{32}\.tmp", before.path)
    record(Row("crash", "stat", "every file", "rename", "synced before", bytes_equal=None))
