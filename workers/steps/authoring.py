"""Steps in which the whole model writes text."""

from collections.abc import Sequence
from functools import cached_property

from rayprune.workers.network.streamed import computed_on
from rayprune.workers.own_text import Author
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit, write_text
from rayprune.workers.store.layout import OWN_FILE
from rayprune.workers.workbench import Workbench


class Authoring:
    """Text of the model's own."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @step
    def write_own(self, task: Task, first: int, lengths: Sequence[int]) -> tuple[Receipt, None]:
        """Write the documents `first`, `first` + 1, ... of so many tokens each, together.

        Raises:
            ModelError: the model cannot be loaded, or its probabilities are not finite.
            SpecError: what it shall go on from will not do.
        """
        written = self._author.write(first, lengths)
        write_text(task.folder / OWN_FILE, "".join(f"{line}\n" for line in written.lines))
        found = {
            "documents": len(written.lines),
            "dropped": written.dropped,
            "tokens": written.tokens,
            "prompts": written.prompts,
        }
        done_on = computed_on(self._bench.device, self._bench.own_dtype)
        commit(task, [OWN_FILE], {"result": found, "computed_on": done_on})
        return found, None

    @cached_property
    def _author(self) -> Author:
        job, bench = self._bench.job, self._bench
        assert job.calibration.own is not None
        return Author(
            bench.checkpoint, job.calibration.own, job.calibration, bench.own_dtype, bench.device
        )
