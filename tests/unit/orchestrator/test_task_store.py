"""A store's folder, whatever others have put there."""

import os
from pathlib import Path

import pytest

from rayprune.orchestrator.execution.task_store import TaskStore
from rayprune.specs.errors import SpecError
from rayprune.workers.store.files import Manifest, Task, commit, write_text
from tests.conftest import edit_manifest, flip_bit, folder_bytes

HEX = "0a" * 16


def done(folder: Path, name: str = "outer") -> tuple[Task, Manifest]:
    task = Task(name, folder, {"n": 1})
    write_text(folder / "file", "content")
    return task, commit(task, ["file"], {})


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    task, manifest = done(tmp_path / "one")
    TaskStore(tmp_path / "store").keep(task, manifest)
    wanted = Task("outer", tmp_path / "two", task.made_from)
    assert TaskStore(tmp_path / "store").fetch(wanted) == manifest
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")


@pytest.mark.parametrize("kind", ["damaged", "another task", "names elsewhere"])
def test_what_is_not_as_it_was_kept_is_not_found(kind: str, tmp_path: Path) -> None:
    task, manifest = done(tmp_path / "one")
    TaskStore(tmp_path / "store").keep(task, manifest)
    (entry,) = (tmp_path / "store").glob("*/*")
    if kind == "damaged":
        flip_bit(entry / "file")
    elif kind == "another task":
        edit_manifest(entry, lambda value: value.update(task="layer-0000"))
    else:
        record = {"bytes": 7, "sha256": manifest.files["file"].sha256}
        edit_manifest(entry, lambda value: value.update(files={"../../../out": record}))
    wanted = Task("outer", tmp_path / "two", task.made_from)
    assert TaskStore(tmp_path / "store").fetch(wanted) is None
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["prefix", "entry"])
def test_links_in_a_store_are_refused(place: str, tmp_path: Path) -> None:
    task, manifest = done(tmp_path / "one")
    entry = tmp_path / "store" / task.fingerprint[:2] / task.fingerprint
    link = entry if place == "entry" else entry.parent
    link.parent.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    link.symlink_to(tmp_path / "outside")
    store = TaskStore(tmp_path / "store")
    with pytest.raises(SpecError, match="is a link; a store holds none"):
        store.keep(task, manifest)
    with pytest.raises(SpecError, match="is a link; a store holds none"):
        store.fetch(task)
    assert list((tmp_path / "outside").iterdir()) == []


def test_entries_of_writers_that_were_killed_go_after_a_day(tmp_path: Path) -> None:
    entries = {age: tmp_path / "ab" / f".{age}.{HEX}.tmp" for age in (1, 100_000)}
    for age, entry in entries.items():
        entry.mkdir(parents=True)
        (entry / "file").write_text("half")
        now = entry.stat().st_mtime
        os.utime(entry, (now - age, now - age))
    TaskStore(tmp_path)
    assert entries[1].exists()
    assert not entries[100_000].exists()
