"""The finished model in the forms of the engines that the job names: a task and a folder each."""

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt, file_digests
from rayprune.workers.store.files import Task, remove_task
from rayprune.workers.store.layout import converted_task
from rayprune.workers.store.side_files import COPIED, side_files


def write_formats(context: Context, model: ModelAt) -> None:
    """Write the model for every target that has a folder of its own.

    Raises:
        SpecError: a form cannot hold the model.
        ModelError: its tokenizer or a weight cannot be written.
    """
    targets, executor = context.job.converted, context.executor
    if not targets:
        return
    beside = file_digests(side_files(model.path, COPIED))
    with context.stage("formats", len(targets)):
        for target in targets:
            inputs = {"model": model.identity, "beside the weights": beside}
            task = context.task(converted_task(target), inputs)

            def write(target: str = target, task: Task = task) -> None:
                remove_task(task.folder)  # what an unfinished attempt left
                executor.wait([executor.on(0).convert(target, str(model.path), task)])

            context.once(task, write)
            context.emit("step-finished", stage="formats", target=target)
