"""A step that writes an exported model in another engine's form."""

from pathlib import Path

from rayprune.workers.formats.written import write_form
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit
from rayprune.workers.workbench import Workbench


class Converting:
    """Forms of other engines."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @step
    def convert(self, target: str, model: str, task: Task) -> tuple[Receipt, None]:
        """Write a model's folder in the form of a target, and record it.

        Raises:
            SpecError: the form cannot hold the model.
            ModelError: its tokenizer or a weight cannot be written.
        """
        commit(task, write_form(target, Path(model), task.folder), {})
        return {}, None
