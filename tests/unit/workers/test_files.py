"""Atomic writes, manifests, digests."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayprune.specs.errors import VerificationError
from rayprune.workers.store.files import (
    MANIFEST_NAME,
    Task,
    commit,
    copy_file,
    damaged_files,
    fingerprint,
    link_file,
    read_manifest,
    record_of,
    write_json,
    write_tensors,
    write_text,
)
from tests.conftest import edit_json, edit_manifest

SHARED = torch.zeros(4)
FAILING: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "x" * 100_000 + "\ud800"),
    "json": lambda path: write_json(path, {"x": float("nan")}),
    "tensors": lambda path: write_tensors(path, {"a": SHARED, "b": SHARED}),
    "copy": lambda path: copy_file(path.with_name("absent"), path),
    "link": lambda path: link_file(path.with_name("absent"), path),
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"x": [1, "é"]}),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(2)}),
    "copy": lambda path: copy_file(Path(__file__), path),
    "link": lambda path: link_file(path.parents[1] / "source", path),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((ValueError, RuntimeError, OSError)):
        FAILING[kind](path)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_replaces_the_old_file_and_makes_folders(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("source")
    path = tmp_path / "folder" / "file"
    for _ in range(2):
        WRITERS[kind](path)
        assert [item.name for item in path.parent.iterdir()] == ["file"]
    assert path.stat().st_size > 0


def test_a_link_shares_the_content_and_replacing_it_leaves_the_source(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    write_text(tmp_path / "b", "two")
    assert (tmp_path / "a").read_text() == "one"


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "b", "")
    task = Task("layer-0001", tmp_path, {"options": {"budget.sparsity": 0.2}})
    written = commit(task, ["b", "a"], {"kept": {"heads": [0, 2]}, "result": 1.5})
    assert (written.fingerprint, written.made_from) == (task.fingerprint, task.made_from)
    assert read_manifest(tmp_path) == written
    assert list(written.files) == ["a", "b"]
    assert (written.files["a"].bytes, written.files["b"].bytes) == (3, 0)
    assert damaged_files(tmp_path, written) == []


def test_digest_covers_files_and_result_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    base = commit(Task("t", tmp_path, {}), ["a"], {"result": 1, "seconds": 3})
    assert (
        commit(Task("other", tmp_path, {"n": 1}), ["a"], {"result": 1, "seconds": 4}).digest
        == base.digest
    )
    assert commit(Task("t", tmp_path, {}), ["a"], {"result": 2}).digest != base.digest
    assert commit(Task("t", tmp_path, {}), [], {"result": 1}).digest != base.digest
    write_text(tmp_path / "a", "two")
    assert commit(Task("t", tmp_path, {}), ["a"], {"result": 1}).digest != base.digest


@pytest.mark.parametrize(
    "torn",
    [
        None,
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff\xfe",
        b'{"task": "t", "fingerprint": "f", "info": {}}',
        b'{"task": "t", "fingerprint": "f", "files": [], "info": {}}',
        b'{"task": "t", "fingerprint": "f", "files": {"a": 3}, "info": {}}',
        b'{"task": "t", "fingerprint": "f", "files": {"a": {"bytes": 3}}, "info": {}}',
        (
            b'{"task": "t", "fingerprint": "f", "files": {"a": {"bytes": 3, "sha256": "", "more":'
            b' 1}}, "info": {}}'
        ),
    ],
)
def test_a_missing_or_torn_manifest_is_none(torn: bytes | None, tmp_path: Path) -> None:
    if torn is not None:
        (tmp_path / MANIFEST_NAME).write_bytes(torn)
    assert read_manifest(tmp_path) is None


def test_a_manifest_cut_anywhere_is_none(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    commit(Task("t", tmp_path, {}), ["a"], {})
    whole = (tmp_path / MANIFEST_NAME).read_bytes().rstrip()
    for length in range(len(whole)):
        (tmp_path / MANIFEST_NAME).write_bytes(whole[:length])
        assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "absent") is None


@pytest.mark.parametrize("value", [{"kept": {2: 0.5, 10: 1e-9}}, {"result": ["é", None, 1.0]}])
def test_what_is_committed_is_what_is_read(value: dict[str, Any], tmp_path: Path) -> None:
    """Numbers as keys too, which JSON does not know."""
    written = commit(Task("t", tmp_path, {}), [], value)
    assert read_manifest(tmp_path) == written
    assert len(written.sha256) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"task": "other"},
        {"fingerprint": "f"},
        {"made_from": {"options": {}}},
        {"files": {}},
        {"info": {"n": 2}},
        {"sha256": "0" * 64},
        {"more": 1},
    ],
    ids=str,
)
def test_an_edited_manifest_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    commit(Task("t", tmp_path, {}), ["a"], {"n": 1})
    edit_json(tmp_path / MANIFEST_NAME, **change)
    assert read_manifest(tmp_path) is None


def test_a_manifest_of_an_earlier_version_is_read_and_not_trusted(tmp_path: Path) -> None:
    commit(Task("t", tmp_path, {}), [], {"n": 1})
    edit_json(tmp_path / MANIFEST_NAME, sha256=None)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert damaged_files(tmp_path, manifest) == [MANIFEST_NAME]


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "b/../../a", "..", ""])
def test_a_manifest_that_names_files_elsewhere_is_none(name: str, tmp_path: Path) -> None:
    commit(Task("t", tmp_path, {}), [], {})
    files = {name: {"bytes": 3, "sha256": "0" * 64}}
    edit_manifest(tmp_path, lambda value: value.update(files=files))
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("place", ["a", "folder/a", MANIFEST_NAME])
def test_a_link_is_no_file_of_a_task(place: str, tmp_path: Path) -> None:
    task = Task("t", tmp_path / "task", {})
    write_text(tmp_path / "task" / "a", "one")
    write_text(tmp_path / "task" / "folder" / "a", "one")
    manifest = commit(task, ["a", "folder/a"], {})
    moved = task.folder / place.split("/")[0]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    assert damaged_files(task.folder, manifest) == ([place] if place != MANIFEST_NAME else [])
    assert (read_manifest(task.folder) is None) == (place == MANIFEST_NAME)


def test_a_file_that_is_known_to_be_another_is_not_recorded(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    known = {"a": record_of(tmp_path / "a")}
    write_text(tmp_path / "a", "two")
    with pytest.raises(VerificationError, match="a: differs from what was written"):
        commit(Task("t", tmp_path, {}), ["a"], {}, known)
    assert read_manifest(tmp_path) is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name in "abcd":
        write_text(tmp_path / name, "content")
    manifest = commit(Task("t", tmp_path, {}), "abcd", {})
    data = bytearray((tmp_path / "b").read_bytes())
    data[3] ^= 1
    (tmp_path / "b").write_bytes(data)
    (tmp_path / "c").unlink()
    (tmp_path / "d").write_text("content and more")
    assert damaged_files(tmp_path, manifest) == ["b", "c", "d"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_tensor_files_honour_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == mode


def test_tensor_bytes_depend_on_the_tensors_alone(tmp_path: Path) -> None:
    tensors = {
        name: torch.full((3, 2), float(number), dtype=dtype)
        for number, (name, dtype) in enumerate(
            [
                ("model.b", torch.float32),
                ("model.a", torch.bfloat16),
                ("lm_head", torch.float16),
                ("a", torch.float64),
            ]
        )
    }
    for name, order in (
        ("one", list(tensors)),
        ("two", sorted(tensors, reverse=True)),
        ("three", sorted(tensors)),
    ):
        write_tensors(tmp_path / name, {key: tensors[key].clone() for key in order})
    assert len({record_of(tmp_path / name) for name in ("one", "two", "three")}) == 1


def test_fingerprint_is_canonical() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"y": "é", "x": ""}}
    assert fingerprint(value) == fingerprint({"a": {"x": "", "y": "é"}, "b": (1, 2.5, None, True)})
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))
    different = [
        {},
        [],
        None,
        0,
        False,
        "",
        "0",
        1,
        1.5,
        [1],
        ["1"],
        [[1]],
        {"a": 1},
        {"a": "1"},
        {"b": 1},
        [1, 2],
        [2, 1],
    ]
    assert len({fingerprint(item) for item in different}) == len(different)


@pytest.mark.parametrize(
    ("value", "error"), [({1, 2}, TypeError), (Path("x"), TypeError), (float("nan"), ValueError)]
)
def test_what_has_no_json_form_has_no_fingerprint(value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        fingerprint(value)


def test_a_full_disk_is_an_error_of_the_machine(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_tensors(tmp_path / "layer.safetensors", {"weight": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (caught.value.errno, caught.value.filename) == (
        errno.EFBIG,
        str(tmp_path / "layer.safetensors"),
    )
    assert not list(tmp_path.iterdir())
