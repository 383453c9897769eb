"""The stage in which models are asked the tasks of lm-eval that a job has."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt
from rayprune.workers.store.files import Manifest, commit, record_of
from rayprune.workers.store.layout import LM_TASKS_TASK, Scope, lm_tasks_task

Scores = Sequence[Mapping[str, Any]]


def open_tasks(context: Context) -> Manifest | None:
    """Load the documents of the tasks, once for all passes, so that one that cannot be had is found
    before any other work; nothing where the job has none.
    """
    spec = context.job.evaluation
    if spec is None or not spec.tasks:
        return None
    context = replace(context, scope=Scope(context.scope.run))
    folder = spec.tasks_folder and _folder_digests(Path(spec.tasks_folder))
    task = context.task(LM_TASKS_TASK, {"folder": folder})
    executor = context.executor

    def work() -> None:
        (receipt,) = executor.wait([executor.on(0).open_lm_tasks()])
        commit(task, [], {"lm_eval": receipt["lm_eval"], "tasks": receipt["tasks"]})

    return context.once(task, work)


def ask_models(context: Context, models: Mapping[str, ModelAt]) -> dict[str, Scores]:
    """What each model achieves, by its name; none where the job has no tasks."""
    if (opened := open_tasks(context)) is None:
        return {}
    with context.stage("lm-eval", len(models)):
        return {name: _asked(context, name, model, opened) for name, model in models.items()}


def _asked(context: Context, name: str, model: ModelAt, opened: Manifest) -> Scores:
    inputs = {"model": model.identity, "lm-eval": opened.digest}
    task, executor = context.task(lm_tasks_task(name), inputs), context.executor

    def work() -> None:
        (receipt,) = executor.wait([executor.on(0).ask_lm_tasks(str(model.path))])
        commit(task, [], {"scores": receipt["scores"], "computed_on": executor.computed_on})

    found: Any = context.once(task, work).info["scores"]
    told = {f"{score['task']} {score['metric']}": score["value"] for score in found}
    context.emit("step-finished", stage="lm-eval", model=name, **told)
    return tuple(found)


def _folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that lies in it, by path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): record_of(file).sha256 for file in files}
