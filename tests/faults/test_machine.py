"""The machine refuses: no room, no rights, no memory, signals, a clock that jumps, files that
change under a run. The exit code says why, nothing finished is lost, and the next run ends whole.
"""

import errno
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.calm import Calm, result_of
from tests.faults.conftest import MakeCalm, Record
from tests.faults.forks import Fault, attempt
from tests.faults.hooks import (
    ActAt,
    ClockJump,
    FailAt,
    FileLimit,
    InterruptAt,
    MemoryLimit,
    Strays,
    Umask,
)
from tests.faults.kinds import KINDS
from tests.faults.reliability import Row

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
NEEDS_ROOM = {"write", "append", "mkdir", "link", "rename"}


def one_of_each(calm: Calm, names: set[str]) -> Iterator[int]:
    """Operations of these names, one for each kind of file."""
    seen = set[tuple[str, str]]()
    for number, operation in enumerate(calm.operations):
        key = (operation.name, operation.where.replace("model-N", "model"))
        if operation.name in names and key not in seen:
            seen.add(key)
            yield number


def refused(
    job: Calm, codes: tuple[int, ...], words: tuple[str, ...], *faults: Fault, timeout: float = 60
) -> str:
    """What is wrong when a run meets faults, and then the same command runs without them."""
    out = job.run.with_name("disturbed")
    ended = job.attempt(out, *faults, timeout=timeout)
    lacks = [word for word in words if ended.code and word not in ended.err]
    if ended.code not in codes or lacks or "Traceback" in ended.err:
        return f"{faults}: ended with {ended.code}, lacks {lacks}: {ended.words[-600:]}"
    again = job.attempt(out)
    if again.code:
        return f"{faults}: and then {again.code}: {again.words[-600:]}"
    return "" if result_of(out) == job.expected else f"{faults}: another result"


@pytest.mark.parametrize("name", ["stat", "recovered", "layers, stored"])
def test_the_disk_is_full(name: str, calm: MakeCalm, record: Record) -> None:
    job, problems = calm(name), list[str]()
    numbers = list(one_of_each(job, {"write", "append"}))
    for number in numbers:
        fault = FailAt(job.fresh(), number)
        problems.append(refused(job, (4,), ("No space left",), fault))
    seen = "exit code 4, `No space left`"
    record(Row("machine", name, "the disk is full, at every kind of file", seen, "goes on later",
               len(numbers), True))  # fmt: skip
    assert not any(problems), "\n".join(filter(None, problems))


@pytest.mark.parametrize("name", ["stat", "recovered"])
@pytest.mark.parametrize("limit", [300, 3000, 20_000, 60_000])
def test_files_may_not_grow(name: str, limit: int, calm: MakeCalm, record: Record) -> None:
    """As with `ulimit -f`: the writer of tensors meets it too."""
    job = calm(name)
    job.fresh()
    words = ("File too large",)
    record(Row("machine", name, f"no file may be larger than {limit} bytes",
               "exit code 4, `File too large`", "goes on later", 1, True))  # fmt: skip
    assert not (problem := refused(job, (4,), words, FileLimit(limit))), problem


@pytest.mark.parametrize(
    "error", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ESTALE]
)
def test_the_folder_refuses(error: int, calm: MakeCalm, record: Record) -> None:
    """A disk that becomes read-only, and the like: at first, half-way, near the end."""
    job, problems, said = calm("stat"), list[str](), os.strerror(error)
    total = len(job.operations)
    codes = (4,) if error == errno.EDQUOT else (2, 4)
    for number in (0, total // 2, total - 20):
        problems.append(refused(job, codes, (said,), FailAt(job.fresh(), number, error)))
    code = " or ".join(map(str, codes))
    record(Row("machine", "stat", f"the folder answers: {said}", f"exit code {code}, `{said}`",
               "goes on later", 3, True))  # fmt: skip
    assert not any(problems), "\n".join(filter(None, problems))


@pytest.mark.parametrize("name", ["stat", "recovered"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(name: str, number: signal.Signals, calm: MakeCalm, record: Record) -> None:
    job, problems = calm(name), list[str]()
    every = 1 if (name, number) == ("stat", signal.SIGINT) else 4
    places = list(one_of_each(job, {"write", "append", "rename"}))[::every]
    for place in places:
        fault = InterruptAt(job.fresh(), place, number)
        problems.append(refused(job, (130,), ("run the same command again",), fault))
    record(Row("machine", name, f"{number.name}, at every kind of file", "exit code 130",
               "goes on later", len(places), True))  # fmt: skip
    assert not any(problems), "\n".join(filter(None, problems))


@pytest.mark.parametrize("mebibytes", [2, 20, 60])
def test_memory_runs_out(mebibytes: int, calm: MakeCalm, record: Record) -> None:
    job = calm("stat")
    job.fresh()
    fault = MemoryLimit(mebibytes * 2**20)
    record(Row("machine", "stat", f"{mebibytes} MiB of memory more may be taken",
               "exit code 4, or enough", "goes on later", 1, True))  # fmt: skip
    assert not (problem := refused(job, (0, 4), ("memory",), fault)), problem


@pytest.mark.parametrize("name", ["stat", "recovered"])
def test_the_clock_jumps(name: str, calm: MakeCalm, record: Record) -> None:
    job = calm(name)
    out = job.fresh()
    assert not (problem := refused(job, (0,), (), ClockJump(86_400.0))), problem
    shutil.rmtree(out)
    ended = job.attempt(out, ClockJump(86_400.0))
    assert ended.code == 0, ended.words
    report = json.loads((out / "report.json").read_text())
    record(Row("machine", name, "the clock jumps by a day, there and back", "no negative time",
               "ends", 1, True))  # fmt: skip
    assert all(seconds >= 0 for seconds in report["seconds"].values()), report["seconds"]
    assert report["seconds"]["total"] < 3600


def cut_off(path: Path) -> None:
    os.truncate(path, 0)


def doubled(path: Path) -> None:
    """Other values under the same names, put in place by a rename, as a download does."""
    tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    path.with_name("new").rename(path)


def layer_of(job: Calm, number: int) -> int:
    """The first operation on a layer's task."""
    return next(n for n, o in enumerate(job.operations) if f"layer-{number:04d}" in o.path)


def test_a_mapped_file_is_cut_off(calm: MakeCalm, record: Record) -> None:
    """The system ends a process that reads behind the end of its file: the signal is named."""
    job = calm("stat")
    weights = job.job.parent / "dense" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        out = job.fresh()
        ended = job.attempt(out, ActAt(out, layer_of(job, 1), cut_off, weights))
        assert ended.code in (3, -signal.SIGBUS), ended.words
        assert any(word in ended.err for word in ("Bus error", "SIGBUS", weights.name)), ended.err
        assert not (out / "model").exists()
        ended = job.attempt(out)
        assert ended.code == 3, ended.words
        assert weights.name in ended.err
    finally:
        weights.write_bytes(kept)
    assert job.attempt(out).code == 0
    record(Row("machine", "stat", "the mapped weights are cut off in mid-sweep",
               "SIGBUS is named; then exit code 3", "goes on once they are back", 1,
               result_of(out) == job.expected))  # fmt: skip
    assert result_of(out) == job.expected


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_other_weights_in_mid_run(layer: int, calm: MakeCalm, record: Record) -> None:
    """Never half of one model and half of another."""
    job = calm("stat")
    weights = job.job.parent / "dense" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        out = job.fresh()
        first = job.attempt(out, ActAt(out, layer_of(job, layer), doubled, weights))
        second = job.attempt(out)
        assert second.code == 0, second.words
        mended = result_of(out)
        job.fresh()
        assert job.attempt(out).code == 0
        equal = mended == result_of(out)
    finally:
        weights.write_bytes(kept)
    record(Row("machine", "stat", f"other weights take their place before layer {layer}",
               f"exit code {first.code}", "the next run is of the new", 1, equal))  # fmt: skip
    assert equal
    assert first.code in (3, 5), first.words


def test_many_drivers_of_one_folder(calm: MakeCalm, record: Record) -> None:
    """One at a time; the others are refused, or find it finished."""
    job = calm("stat")
    out = job.fresh()
    with ThreadPoolExecutor(6) as pool:
        ended = list(pool.map(lambda _: job.attempt(out), range(6)))
    assert {end.code for end in ended} <= {0, 2}, ended
    assert any(end.code == 0 for end in ended)
    assert all("another run is writing here" in end.err for end in ended if end.code)
    record(Row("machine", "stat", "six drivers of one run folder", "one at a time",
               "one ends, the others are refused", 6, result_of(out) == job.expected))  # fmt: skip
    assert result_of(out) == job.expected


def test_many_drivers_of_one_store(calm: MakeCalm, record: Record) -> None:
    job = calm("layers, stored")
    store = ["--store", str(job.fresh().with_name("disturbed-store"))]

    def run(number: int) -> Path:
        out = job.run.with_name(f"beside-{number}")
        words = [*job.command(out)[:-2], *store]
        ended = attempt(words, *KINDS[job.name].faults)
        assert ended.code == 0, ended.words
        return out

    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(run, range(4)))
    equal = all(result_of(out) == job.expected for out in outs)
    for out in outs:
        shutil.rmtree(out)
    record(Row("machine", job.name, "four runs fill one store", "none waits for another",
               "all end", 4, equal))  # fmt: skip
    assert equal


@pytest.mark.parametrize("name", list(KINDS))
def test_nothing_is_written_elsewhere(name: str, calm: MakeCalm, record: Record) -> None:
    """Neither beside the model and the texts nor at home: in the run folder, the store, and the
    system's folder for temporary files.
    """
    job = calm(name)
    out, file = job.fresh(), job.run.with_name("strays")
    file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TMPDIR"] = temporary
        allowed = (out, Path(temporary), Path("/dev"), Path("/proc"))
        ended = job.attempt(out, Strays(allowed, file))
        del os.environ["TMPDIR"]
    assert ended.code == 0, ended.words
    tidy = not any(job.job.parent.joinpath("dense").glob("*.tmp"))
    record(Row("hostile", "home, model and text folders", f"`{name}` runs", "nothing is written",
               "whole", 1, result_of(out) == job.expected))  # fmt: skip
    strays = set(file.read_text().splitlines())
    assert not {path for path in strays if not path.startswith(tempfile.gettempdir() + "/torch")}
    assert tidy


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_inherit_the_umask(mask: int, calm: MakeCalm, record: Record) -> None:
    for name in ("recovered", "curves"):
        job = calm(name)
        out = job.fresh()
        ended = job.attempt(out, Umask(mask))
        assert ended.code == 0, ended.words
        modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*")}
        files = {path: mode for path, mode in modes.items() if path.is_file()}
        wrong = {path.name for path, mode in files.items() if mode != 0o666 & ~mask}
        assert wrong - {"run.lock"} == set()
        assert not any(mode & mask for mode in modes.values())
    record(Row("hostile", "run folder", f"umask {mask:03o}", "every file has it", "whole", 2,
               result_of(out) == job.expected))  # fmt: skip
