"""Whether a worker sees the driver's files: a run on several nodes stands on storage that all of
them share. No torch.
"""

import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rayprune.specs.errors import ResourceError
from rayprune.workers.store.files import FileRecord, record_of, write_text


@contextmanager
def marker_file(folder: Path) -> Iterator[Path]:
    """A file with a random content, under a name that no node has looked up before, so that no
    cache can answer for it.
    """
    token = secrets.token_hex(16)
    path = folder / f".storage.{token}.tmp"
    write_text(path, token)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def check_same_files(expected: Mapping[str, FileRecord]) -> None:
    """Check that this node sees files as they are recorded (bytes, SHA-256), under the same paths.

    Raises:
        ResourceError: a file is missing, not readable, or another one; the error names this node.
    """
    for path, record in expected.items():
        try:
            problem = (
                ""
                if record_of(Path(path)) == record
                else "is another file here than on the driver's node"
            )
        except OSError as error:
            problem = f"cannot be read here: {error.strerror}"
        if problem:
            raise ResourceError(
                f"node {node_name()}: {path}: {problem}; mount the storage that holds model, texts"
                " and run folder on every node, under the same path"
            )


def node_name() -> str:
    """This machine's name, with its address where one is known."""
    host = socket.gethostname()
    try:
        return f"{host} ({socket.gethostbyname(host)})"
    except OSError:
        return host
