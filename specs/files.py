"""Files that a user names: regular ones alone are opened, and documents within a size.

A named pipe nobody writes to never ends, nor does a device such as /dev/zero.
"""

import os
import stat
from pathlib import Path

from rayprune.specs.errors import ModelError, RaypruneError, SpecError

_KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}
_OPEN_ALREADY = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Where a pipe is that has a writer: what a shell puts before a command."""


def no_file(mode: int) -> str | None:
    """What is at a path, by its mode, where it is neither a file nor a folder."""
    return next((name for is_kind, name in _KINDS.items() if is_kind(mode)), None)


def read_document(
    path: Path, most: int, what: str, error_type: type[RaypruneError] = SpecError
) -> bytes:
    """All bytes of a document, such as a job or a config; links are followed.

    Raises:
        RaypruneError: of `error_type`: not a regular file, larger than `most` bytes, or not
            readable.
    """
    try:
        mode = path.stat().st_mode
        piped = stat.S_ISFIFO(mode) and str(path).startswith(_OPEN_ALREADY)
        if (kind := no_file(mode)) and not piped:
            raise error_type(
                f"{path}: cannot read {what}: {kind}, not a file; write it to a file first"
            )
        with path.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise error_type(
            f"{path}{link}: cannot read {what}: {error.strerror}; check the path and its"
            " permissions"
        ) from error
    if len(content) > most:
        raise error_type(f"{path}: larger than {most} bytes; is this {what}?")
    return content


def within(folder: Path, file: Path) -> Path:
    """The file itself, which must lie in the model folder, or beside it in the blobs of a hub
    cache: what a link brings in from elsewhere would be copied for everybody to read.

    Raises:
        ModelError: it lies elsewhere.
    """
    root, target = folder.resolve(), file.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{file}: links to {target}, outside the model folder; copy the file into the folder"
        )
    return file
