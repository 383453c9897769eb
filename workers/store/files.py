"""The one module that writes files: temp file, fsync, rename, fsync of the folder; a task's
manifest last.

No torch at import. A task is done when its manifest exists, carries the planned fingerprint and
fits its files.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Task:
    """A task that is to be done."""

    name: str
    """Within its pass over a model."""
    folder: Path
    """Where its artifact and manifest will lie."""
    made_from: Mapping[str, object]
    """What its result depends on, as JSON: options of the job, digests of what it reads, software,
    and how it is computed.
    """

    @property
    def fingerprint(self) -> str:
        """SHA-256 over its name and all that it depends on."""
        return fingerprint({"task": self.name, "made_from": self.made_from})


@dataclass(frozen=True)
class Manifest:
    """The record of a finished task."""

    task: str
    fingerprint: str
    made_from: Mapping[str, object]
    files: dict[str, FileRecord]
    info: dict[str, object]

    @property
    def digest(self) -> str:
        """SHA-256 over what the task made: the input of the tasks that follow."""
        return fingerprint(
            {
                "files": {name: asdict(record) for name, record in self.files.items()},
                "info": self.info.get("result"),
            }
        )


def fingerprint(value: object) -> str:
    """SHA-256 of a value's canonical JSON.

    Raises:
        TypeError: the value has no JSON form.
    """
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file."""
    with path.open("rb") as handle:
        return FileRecord(path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest())


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Have `save` write a temporary neighbour, then move it into place; nothing half-written ever
    has the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    _write(path, lambda temporary: _ignore(temporary.write_text(text, encoding="utf-8")))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's content atomically."""
    _write(path, lambda temporary: _ignore(shutil.copyfile(source, temporary)))


def link_file(source: Path, path: Path) -> None:
    """Give a finished file a second name, or copy it where the file system has no hard links."""

    def _link(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    _write(path, _link)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file atomically, with bytes that depend on the tensors alone, readable as
    the umask allows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def _save(temporary: Path) -> None:
        try:
            save_file(dict(sorted(tensors.items())), temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its writer tells only in words what the machine refused
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # save_file leaves 0600, which other users cannot read

    _write(path, _save)


def commit(task: Task, files: Iterable[str], info: Mapping[str, object]) -> Manifest:
    """Record a task as finished: the last thing its maker does.

    Shapes and units: `files` are names inside its folder; `info` is JSON, its key `result` enters
    the digest.
    """
    manifest = Manifest(
        task.name,
        task.fingerprint,
        task.made_from,
        {name: record_of(task.folder / name) for name in sorted(files)},
        dict(info),
    )
    write_json(task.folder / MANIFEST_NAME, asdict(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished task, or None when there is none or it is torn."""
    try:
        value = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = {name: FileRecord(**record) for name, record in value["files"].items()}
        made_from = value.get("made_from", {})  # there was none in the first versions
        return Manifest(value["task"], value["fingerprint"], made_from, files, value["info"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_task(folder: Path) -> None:
    """Remove what a task has left, its manifest first."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of recorded files that are missing or differ from their record."""
    return [
        name
        for name, record in manifest.files.items()
        if not (folder / name).is_file() or record_of(folder / name) != record
    ]


def _ignore(_: object) -> None:
    return None
