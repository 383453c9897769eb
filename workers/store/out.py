"""Which folder a run may write in: a new one, or that of an earlier run. No torch."""

import os
from collections.abc import Iterable
from pathlib import Path

from rayprune.specs.errors import SpecError
from rayprune.workers.store.layout import (
    CACHE,
    EVENTS_FILE,
    EXPORTS,
    JOB_FILE,
    LOCK_FILE,
    TASKS,
    model_folder,
)


def check_out(run: Path, read: Iterable[str]) -> None:
    """Check that a folder is new, or an earlier run's, and that nothing of what a job reads lies
    where a run writes.

    Raises:
        SpecError: it is somebody else's, or a run would write over what it reads.
        OSError: it cannot be looked at.
    """
    others = run.exists() and [
        item for item in run.iterdir() if item.name != LOCK_FILE and item.suffix != ".tmp"
    ]
    marks = (LOCK_FILE, EVENTS_FILE)  # a job file alone may be what a person has written
    ours = (run / JOB_FILE).exists() and any((run / name).exists() for name in marks)
    if others and not ours:
        raise SpecError(
            f"{run}: is not empty and holds no earlier run; --out must name a new folder or an"
            " earlier run"
        )
    written = [os.path.realpath(run / name) for name in (CACHE, TASKS, EXPORTS)]
    written.append(os.path.realpath(model_folder(run)))
    for path in read:
        for folder in written:
            if os.path.commonpath([folder, os.path.realpath(path)]) == folder:
                raise SpecError(
                    f"{path}: the job reads it, and a run in {run} writes there; choose another"
                    " --out"
                )
