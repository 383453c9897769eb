"""Jobs, command lines, models and texts that will not do: what is said, with which exit code, in a
second or two, before Ray starts; nothing is left half-done and the model folder is as it was.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import folder_bytes, write_job
from tests.faults.bad_input import BAD, DAYS, Bad, Place, Spoil, other_text, replaced
from tests.faults.conftest import Record
from tests.faults.forks import attempt
from tests.faults.hooks import NoRay, NoRoom, Without
from tests.faults.reliability import Row
from tests.models import build_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]
SECONDS = 4.0
"""A second or two, and as much for a machine that is busy."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that is valid, and would run."""
    assert attempt(["--version"]).code == 0  # the first one waits until all is imported
    place = Place(tmp_path_factory.mktemp("good"))
    place.text.write_text(DAYS[: 8 * 64])
    write_job(
        place.job,
        place.text,
        build_model(place.model),
        calibration={"samples": 8, "sequence_length": 32},
        cluster={"executor": "ray"},
    )
    return place.folder


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Place:
    """A copy of it."""
    place = Place(tmp_path / "place")
    shutil.copytree(good, place.folder)
    place.job.write_text(place.job.read_text().replace(str(good), str(place.folder)))
    return place


def regular(folder: Path) -> dict[str, bytes]:
    """Content of ordinary files; pipes and devices never end."""
    return {} if any(p.is_fifo() or p.is_char_device() for p in folder.rglob("*")) else (
        folder_bytes(folder)
    )  # fmt: skip


def test_the_good_one_is_valid(place: Place) -> None:
    """Otherwise every row below would be."""
    ended = attempt(["validate", str(place.job)], NoRay())
    assert ended.code == 0, ended.words
    words = ["--out", str(place.out), "--set", "cluster.executor=in-process"]
    ended = attempt(["run", str(place.job), *words])
    assert ended.code == 0, ended.words


@pytest.mark.parametrize("bad", BAD, ids=[bad.name.replace(" ", "_")[:60] for bad in BAD])
def test_bad_input(bad: Bad, place: Place, record: Record) -> None:
    bad.spoil(place)
    before, problems = regular(place.model), []
    for command in bad.commands:
        words = [command.split()[0], str(place.job)]
        words += ["--deep"] if "--deep" in command else []
        words += [word for override in bad.sets for word in ("--set", override)]
        words += ["--out", str(place.out)] if words[0] == "run" else []
        words += ["--set", "cluster.executor=in-process"] if "in-process" in command else []
        ended = attempt(words, NoRay(), timeout=20, folder=place.folder)
        lacks = [word for word in bad.words if word not in ended.err]
        if ended.code != bad.code or lacks or "Traceback" in ended.err or ended.seconds > SECONDS:
            problems.append(f"{command}: {ended.code} in {ended.seconds:.1f} s, lacks {lacks}:")
            problems.append(ended.words[-400:])
    said, seen = ", ".join(f"`{word}`" for word in bad.words), f"refused, {bad.code}"
    record(Row("input", ", ".join(bad.commands), bad.name, said, seen, len(bad.commands)))
    assert not problems, "\n".join(problems)
    assert not (place.out / "model").exists()
    assert regular(place.model) == before


@dataclass(frozen=True)
class Line:
    """A command line that will not do; `{}` is the folder of a good job."""

    words: str
    code: int
    said: tuple[str, ...]
    prepare: Spoil = lambda place: None


RUN = "run {}/job.yaml --set cluster.executor=in-process --out"
LINES = [
    Line("", 2, ("usage",)),
    Line("prune {}/job.yaml", 2, ("prune", "run")),
    Line("run {}/job.yaml", 2, ("--out",)),
    Line("run --out {}/run", 2, ("JOB.yaml",)),
    Line(f"{RUN} {{}}/text.txt", 2, ("text.txt",)),
    Line(f"{RUN} {{}}/text.txt/run", 2, ("text.txt",)),
    Line(f"{RUN} {{}}/dense", 2, ("dense", "not empty")),
    Line(f"{RUN} {{}}/run --store {{}}/text.txt", 2, ("text.txt",)),
    Line(f"{RUN} {{}}/run --redo all", 2, ("--redo", "stale")),
    Line(f"{RUN} {{}}/loop", 2, ("loop",), lambda p: (p.folder / "loop").symlink_to("loop")),
    Line("plan {}/job.yaml --profile h900", 2, ("h900", "h100-80gb")),
    Line("plan {}/job.yaml --profile {}/text.txt", 2, ("text.txt",)),
    Line("report {}/nowhere", 2, ("nowhere",)),
    Line("report {}/dense", 2, ("dense",)),
    Line("report {}/run", 2, ("report.json",),
         lambda place: (place.out.mkdir(), replaced(place.out / "report.json", "{}"))),
    Line("verify {}/nowhere", 2, ("nowhere",)),
    Line("verify {}/text.txt", 2, ("text.txt",)),
    Line("generate {}/nowhere", 3, ("nowhere",)),
    Line("generate {}/dense --prompts {}/nowhere.txt", 2, ("nowhere.txt",)),
    Line("generate {}/dense --tokens 0", 2, ("--tokens",)),
    Line("generate {}/dense --temperature -1", 2, ("--temperature",)),
    Line("latency {}/nowhere", 3, ("nowhere",)),
    Line("latency {}/dense --batch 0", 2, ("--batch",)),
    Line("submit {}/job.yaml --out {}/run --address http://127.0.0.1:9", 4, ("127.0.0.1:9",)),
    Line("submit {}/job.yaml --out run --address http://127.0.0.1:9", 2, ("--out", "absolute")),
    Line("submit {}/job.yaml --out {}/run --address nonsense", 2, ("nonsense",)),
    Line(f"{RUN} {{}}/run --set parallel.device=cuda", 4, ("cuda",)),
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=[line.words.replace("{}/", "") for line in LINES])
def test_bad_command_line(line: Line, place: Place, record: Record) -> None:
    line.prepare(place)
    before = regular(place.model)
    ended = attempt(line.words.replace("{}", str(place.folder)).split(), timeout=40)
    record(
        Row(
            "input",
            "command line",
            f"`{line.words.replace('{}/', '')}`",
            ", ".join(f"`{word}`" for word in line.said),
            f"refused, {line.code}",
        )
    )
    assert ended.code == line.code, ended.words
    assert "Traceback" not in ended.err, ended.err
    assert all(word in ended.err for word in line.said), ended.err
    assert not (place.out / "model").exists()
    assert regular(place.model) == before


WARNED = [
    ("an evaluation window beyond the positions", other_text(window=512), "evaluation.window"),
    ("a calibration window beyond the positions",
     lambda place: place.text_as("long.txt", DAYS * 2, sequence_length=512),
     "calibration.sequence_length"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "spoil", "word"), WARNED, ids=[row[0] for row in WARNED])
def test_a_warning(what: str, spoil: Spoil, word: str, place: Place, record: Record) -> None:
    """What is allowed, and does harm."""
    spoil(place)
    ended = attempt(["validate", str(place.job)], NoRay())
    record(Row("input", "validate", f"text: {what}", f"`warning`, `{word}`", "warned"))
    assert ended.code == 0, ended.words
    assert f"warning: {word}" in ended.words
    assert "256" in ended.words


NEEDS = [
    ("room on the disk", NoRoom(1000), {}, ("1000",)),
    ("the package peft", Without("peft"), {"recover": {"epochs": 1, "lora": {"rank": 2}}},
     ("peft",)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "fault", "sections", "said"), NEEDS, ids=[n[0] for n in NEEDS])
def test_something_is_missing(
    what: str, fault: Any, sections: Any, said: tuple[str, ...], place: Place, record: Record
) -> None:
    """`validate` and `run` say so before any work."""
    place.edit(**sections)
    seen = ", ".join(f"`{word}`" for word in said)
    record(Row("input", "validate, run", f"missing: {what}", seen, "refused, 4", 2))
    for command in ("validate", "run"):
        ended = attempt([command, str(place.job), "--out", str(place.out)], fault, timeout=20)
        assert ended.code == 4, f"{command}: {ended.words}"
        assert "Traceback" not in ended.err
        assert all(word in ended.err for word in said), ended.err
        assert not (place.out / "tasks").exists()
