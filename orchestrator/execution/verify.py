"""Whether the files of a finished run are as they were recorded."""

import json
from pathlib import Path

from rayprune.orchestrator.execution.run_folder import PLAN_FILE
from rayprune.specs.errors import VerificationError
from rayprune.workers.store.files import damaged_files, read_manifest
from rayprune.workers.store.layout import TASKS, Scope, model_folder, task_folder


def _planned_tasks(run: Path) -> list[str]:
    """The tasks of every pass over a model, by their names in the run folder."""
    passes = [plan.parent for plan in sorted((run / TASKS).rglob(PLAN_FILE))]
    scopes = [Scope(run), *(Scope(run, str(path.relative_to(run / TASKS))) for path in passes)]
    return [scope.task(task) for scope in scopes for task in _tasks_of(scope)]


def _tasks_of(scope: Scope) -> list[str]:
    plan = scope.about / PLAN_FILE
    try:
        tasks: list[str] = json.loads(plan.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError):
        raise VerificationError(f"{plan}: missing or damaged; run the job again") from None
    return tasks


def verify_run(run: Path) -> list[str]:
    """Compare every recorded file of a finished run with its record; the names of the tasks that
    were checked.

    Raises:
        VerificationError: the run is not finished, or a file differs.
    """
    if read_manifest(model_folder(run)) is None:
        raise VerificationError(f"{run}: no exported model here; run the job to its end first")
    tasks = _planned_tasks(run)
    for task in tasks:
        manifest = read_manifest(task_folder(run, task))
        if manifest is None:
            raise VerificationError(f"{run}: task {task} is not finished; run the job again")
        if damaged := damaged_files(task_folder(run, task), manifest):
            raise VerificationError(
                f"{task_folder(run, task) / damaged[0]}: differs from its record; run the job again"
                " to rebuild it"
            )
    return tasks
