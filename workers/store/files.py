"""The one module that writes files: temp file, fsync, rename, fsync of the folder; a task's
manifest last.

No torch at import. A task is done when its manifest exists, is whole, carries the planned
fingerprint and fits its files.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from rayprune.specs.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")
THREADS = min(8, os.cpu_count() or 1)
MANIFEST_NAME = "manifest.json"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""What `_write` calls a file until it is whole: nobody else's has such a name."""


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
    sha256: str = ""
    """Over all the rest, as it was written; the first versions wrote none."""

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


def at_once(work: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Some work on every item, where it is a thread's: reading and hashing, or a library that lets
    others run meanwhile.
    """
    given = list(items)
    if len(given) < 2:
        return [work(item) for item in given]
    with ThreadPoolExecutor(min(len(given), THREADS)) as threads:
        return list(threads.map(work, given))


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
        if path.is_dir():  # nothing of ours: it has only the name
            remove(path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_file(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file atomically that a library saves: `save` is given a path beside it."""
    _write(path, save)


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


def write_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", word: tuple[str, str] = ("format", "pt")
) -> None:
    """Write a safetensors file atomically, with bytes that depend on the tensors (and on a word of
    its header, by name: several would lie in any order) alone, readable as the umask allows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def _save(temporary: Path) -> None:
        try:
            save_file(dict(sorted(tensors.items())), temporary, metadata=dict([word]))
        except SafetensorError as error:  # its writer tells only in words what the machine refused
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # save_file leaves 0600, which other users cannot read

    _write(path, _save)


def commit(
    task: Task,
    files: Iterable[str],
    info: Mapping[str, object],
    known: Mapping[str, FileRecord] = MappingProxyType({}),
) -> Manifest:
    """Record a task as finished: the last thing its maker does.

    Shapes and units: `files` are names inside its folder; `info` is JSON, its key `result` enters
    the digest. `known` are records that files must fit, since they are others under new names.

    Raises:
        VerificationError: a file is not the one that is known.
    """
    names = sorted(files)
    records = at_once(lambda name: record_of(task.folder / name), names)
    found = dict(zip(names, records, strict=True))
    if wrong := [name for name, record in known.items() if found[name] != record]:
        raise VerificationError(
            f"{task.folder / wrong[0]}: differs from what was written; run the same command again"
            " to rebuild it"
        )
    manifest = Manifest(task.name, task.fingerprint, task.made_from, found, dict(info))
    value: dict[str, Any] = json.loads(json.dumps(asdict(manifest)))  # as it is read again
    value["sha256"] = _digest_of_the_rest(value)
    write_json(task.folder / MANIFEST_NAME, value)
    return _manifest(value)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished task, or None when there is none, or it is torn, edited, or names
    files outside its folder.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.is_symlink() or not path.is_file():
            return None
        value = json.loads(path.read_bytes())
        whole = "sha256" not in value or value["sha256"] == _digest_of_the_rest(value)
        return _manifest(value) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _digest_of_the_rest(value: Mapping[str, object]) -> str:
    """SHA-256 of all of a manifest's content but its own digest."""
    return fingerprint({key: entry for key, entry in value.items() if key != "sha256"})


def _manifest(value: Mapping[str, Any]) -> Manifest:
    """A manifest's content, checked.

    Raises:
        ValueError: it is not of the kind.
    """
    files = {name: FileRecord(**record) for name, record in value["files"].items()}
    made_from, info = value.get("made_from", {}), value["info"]  # there was none at first
    if not (isinstance(made_from, dict) and isinstance(info, dict) and all(map(_below, files))):
        raise ValueError("no manifest")
    return Manifest(
        value["task"], value["fingerprint"], made_from, files, info, value.get("sha256", "")
    )


def _below(name: str) -> bool:
    """Whether a file's name stays in the folder it starts from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def remove(path: Path) -> None:
    """Remove a file, or a folder in its place; nothing where there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_task(folder: Path) -> None:
    """Remove what a task has left, its manifest first."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of recorded files that are missing, are links, or differ from their record; and of the
    manifest where it has no digest of its own.
    """
    unsealed = [] if manifest.sha256 else [MANIFEST_NAME]
    fits = at_once(lambda item: _fits(folder, *item), manifest.files.items())
    return unsealed + [name for name, fit in zip(manifest.files, fits, strict=True) if not fit]


def _fits(folder: Path, name: str, record: FileRecord) -> bool:
    path = folder / name
    try:
        plain = path.is_file() and path.resolve() == folder.resolve() / name
        return plain and path.stat().st_size == record.bytes and record_of(path) == record
    except OSError:
        return False


def _ignore(_: object) -> None:
    return None
