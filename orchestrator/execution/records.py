"""What a report says of the files it stands on: digests of every task's manifest and of what lies
beside it. With its own digest it is the beginning of a chain that ends at every file of the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.run_folder import BENCH_FILE, PAGE_FILE, REPORT_FILE
from rayprune.specs.errors import SpecError, VerificationError
from rayprune.workers.store.files import fingerprint, read_manifest, record_of
from rayprune.workers.store.layout import (
    CARD_FILE,
    JOB_FILE,
    PLAN_FILE,
    TASKS,
    Scope,
    model_folder,
    recovered_folder,
    task_folder,
)

SEAL = "sha256"


def records(run: Path) -> dict[str, dict[str, str]]:
    """Digests of the manifests of the planned tasks, of the models' cards, and of the files beside
    the report.

    Raises:
        VerificationError: a plan is missing or damaged.
    """
    found = {name: read_manifest(task_folder(run, name)) for name in planned_tasks(run)}
    tasks = {name: manifest.sha256 for name, manifest in found.items() if manifest}
    named = [run / name for name in (JOB_FILE, PLAN_FILE, PAGE_FILE)]
    cards = [folder / CARD_FILE for folder in (model_folder(run), recovered_folder(run))]
    may_be = (*cards, run / BENCH_FILE)
    files = {
        file.relative_to(run).as_posix(): record_of(file).sha256
        for file in (*named, *filter(Path.is_file, may_be))
    }
    return {"tasks": tasks, "files": files}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A report's content with the digest of all of it."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return {**rest, SEAL: fingerprint(rest)}


def read_sealed_report(run: Path) -> dict[str, Any]:
    """The content of a finished run's report, as it was written.

    Raises:
        SpecError: it is no run folder.
        VerificationError: there is no report, or it is another one.
    """
    path = run / REPORT_FILE
    if not path.is_file():
        if not (run / JOB_FILE).is_file():
            raise SpecError(
                f"{run}: is no run folder: it has no {JOB_FILE}; give the one that --out named"
            )
        raise VerificationError(f"{path}: no such file; run the job to its end first")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        whole = content[SEAL] == sealed(content)[SEAL] and bool(content["records"]["tasks"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise VerificationError(
            f"{path}: is not as this version has written it; run the job again to write it anew"
        )
    return content


def planned_tasks(run: Path) -> list[str]:
    """The tasks of every pass over a model, by their names in the run folder.

    Raises:
        VerificationError: a plan is missing or damaged.
    """
    tasks, passes = _planned(Scope(run))
    names = (plan.parent.relative_to(run / TASKS) for plan in (run / TASKS).rglob(PLAN_FILE))
    # others are of another job that was stopped here
    for scope in [Scope(run, str(name)) for name in sorted(names) if name.parts[0] in passes]:
        tasks += [scope.task(task) for task in _planned(scope)[0]]
    return tasks


def _planned(scope: Scope) -> tuple[list[str], set[str]]:
    """The tasks of a plan, and the passes that it has besides its own."""
    plan = scope.about / PLAN_FILE
    try:
        document = json.loads(plan.read_bytes())
        tasks: list[str] = document["tasks"]
        written = [need["task"].partition("/") for need in document["disk"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise VerificationError(f"{plan}: missing or damaged; run the job again") from None
    return tasks, {scope for scope, inside, _ in written if inside}
