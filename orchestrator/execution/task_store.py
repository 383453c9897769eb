"""Finished tasks by fingerprint, beside run folders: what one run has done another one finds.

An entry is a folder named by the fingerprint, with the task's files and manifest. It appears whole,
by one rename, so that runs may write at the same time; an entry that is damaged counts as none.
"""

import shutil
import uuid
from pathlib import Path

from rayprune.workers.store.files import (
    MANIFEST_NAME,
    Manifest,
    Task,
    copy_file,
    damaged_files,
    link_file,
    read_manifest,
)


class TaskStore:
    """A folder of finished tasks."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def fetch(self, task: Task) -> Manifest | None:
        """Put a task that somebody has finished where it belongs, if there is one."""
        entry = self._entry(task)
        manifest = read_manifest(entry)
        if manifest is None or manifest.made_from != task.made_from:
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
        return self.path / task.fingerprint[:2] / task.fingerprint

    @staticmethod
    def _whole(entry: Path) -> bool:
        manifest = read_manifest(entry)
        return manifest is not None and not damaged_files(entry, manifest)
