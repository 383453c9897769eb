"""Finished tasks by fingerprint, beside run folders: what one run has done another one finds.

An entry is a folder named by the fingerprint, with the task's files and manifest. It appears whole,
by one rename, so that runs may write at the same time; an entry that is damaged counts as none.
"""

import shutil
import time
import uuid
from pathlib import Path

from rayprune.specs.errors import SpecError
from rayprune.workers.store.files import (
    MANIFEST_NAME,
    TEMPORARY,
    Manifest,
    Task,
    copy_file,
    damaged_files,
    link_file,
    read_manifest,
)

ABANDONED_SECONDS = 86_400.0
"""Nobody takes so long to put an entry down: one that is unfinished after a day was killed."""


class TaskStore:
    """A folder of finished tasks."""

    def __init__(self, path: Path) -> None:
        """The folder; it is made.

        Raises:
            SpecError: it cannot be a folder.
        """
        self.path = path.absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"--store {path}: {error.strerror}; give a folder, or a place for one"
            ) from None
        for entry in self.path.glob("??/.*.tmp"):
            self._remove_abandoned(entry)

    def fetch(self, task: Task) -> Manifest | None:
        """Put a task that somebody has finished where it belongs, if there is one."""
        entry = self._entry(task)
        manifest = read_manifest(entry)
        if manifest is None or (manifest.task, manifest.made_from) != (task.name, task.made_from):
            return None
        if damaged_files(entry, manifest):
            return None
        for name in manifest.files:
            link_file(entry / name, task.folder / name)
        copy_file(entry / MANIFEST_NAME, task.folder / MANIFEST_NAME)
        return manifest

    def keep(self, task: Task, manifest: Manifest) -> None:
        """Keep a finished task, if it is not here already."""
        entry = self._entry(task)
        if self._whole(entry):
            return
        temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.tmp")
        temporary.mkdir(parents=True)
        try:
            for name in manifest.files:
                link_file(task.folder / name, temporary / name)
            copy_file(task.folder / MANIFEST_NAME, temporary / MANIFEST_NAME)
            shutil.rmtree(entry, ignore_errors=True)  # one that is damaged
            temporary.rename(entry)
        except OSError:
            if not self._whole(entry):  # else another run was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _entry(self, task: Task) -> Path:
        """Where a task's entry lies, or would.

        Raises:
            SpecError: there is a link, which leads elsewhere.
        """
        entry = self.path / task.fingerprint[:2] / task.fingerprint
        for place in (entry.parent, entry):
            if place.is_symlink():
                raise SpecError(f"{place}: is a link; a store holds none: remove it from there")
        return entry

    @staticmethod
    def _remove_abandoned(entry: Path) -> None:
        if not TEMPORARY.fullmatch(entry.name) or entry.is_symlink() or entry.parent.is_symlink():
            return
        try:
            if time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
        except FileNotFoundError:
            return  # its writer has just ended, or somebody else has removed it

    @staticmethod
    def _whole(entry: Path) -> bool:
        manifest = read_manifest(entry)
        return manifest is not None and not damaged_files(entry, manifest)
