"""The stage that measures gradients of the loss, where the method asks for them."""

from typing import Any

from rayprune.orchestrator.execution.steps import Call
from rayprune.orchestrator.planning.workload import GRADIENT_WINDOWS_AT_ONCE
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Subject
from rayprune.workers.store.files import Manifest, Task
from rayprune.workers.store.layout import GRADIENTS_TASK


def measure_gradients(context: Context, subject: Subject) -> Manifest | None:
    """The root mean square of the loss's gradient at every consumer's input of the dense model,
    where the method asks for it.
    """
    if not context.job.gradient_windows:
        return None
    task = context.task(GRADIENTS_TASK, subject.all_of_it())
    return context.once(task, lambda: _measure_gradients(context, task))


def _measure_gradients(context: Context, task: Task) -> None:
    executor, count, at_once = (
        context.executor,
        context.job.gradient_windows,
        GRADIENT_WINDOWS_AT_ONCE,
    )
    shares, measured = executor.shares(count), list[Call[Any]]()
    rounds = range(0, max(stop - start for _, (start, stop) in shares), at_once)
    with context.stage("gradients", len(rounds)):
        for done in rounds:
            parts = {
                worker: range(start, stop)[done : done + at_once]
                for worker, (start, stop) in shares
            }
            calls = [
                executor.on(worker).gradients((part.start, part.stop))
                for worker, part in parts.items()
                if part
            ]
            executor.wait(calls)
            measured += calls
            windows, memory = sum(map(len, parts.values())), context.peak_memory_bytes()
            context.emit(
                "step-finished", stage="gradients", windows=windows, peak_memory_bytes=memory
            )
        executor.wait([executor.on(0).write_gradients(task, *(call.payload for call in measured))])
