"""What may lie in a folder of ours: files and folders, no links and nothing else. No torch.

Whoever can put a link into a folder that we write to, or remove from, could lead us elsewhere.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rayprune.specs.errors import SpecError
from rayprune.workers.store.files import TEMPORARY


def check_plain(root: Path, remedy: str) -> None:
    """Check that nothing below a folder leads out of it.

    Raises:
        SpecError: there is a link, a pipe, a socket or a device; it ends with the `remedy`.
    """
    for entry in _entries(root):
        mode = _mode(entry)
        if stat.S_ISLNK(mode):
            raise SpecError(f"{entry}: is a link to {os.readlink(entry)}; {remedy}")
        if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SpecError(f"{entry}: is neither a file nor a folder; {remedy}")


def remove_temporaries(root: Path) -> None:
    """Remove files that writers which are no more have left half-written; nobody else may be
    writing there.
    """
    for entry in _entries(root):
        if TEMPORARY.fullmatch(entry.name) and stat.S_ISREG(_mode(entry)):
            entry.unlink(missing_ok=True)


def _entries(root: Path) -> Iterator[Path]:
    """Everything below a folder; links are not followed."""
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, name) for name in (*folders, *files))


def _mode(entry: Path) -> int:
    """An entry's own mode; 0 when it has just gone."""
    try:
        return entry.lstat().st_mode
    except FileNotFoundError:
        return 0
