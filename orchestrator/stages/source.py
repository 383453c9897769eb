"""The stage that tells a model from others with tensors of the same names and sizes: it digests
every layer's values.

That reads the model once. It is repeated only where sizes or times of its files differ.
"""

from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Task, commit
from rayprune.workers.store.layout import SOURCE_TASK


def identify(context: Context, checkpoint: Checkpoint) -> ModelAt:
    """The model with digests of its values."""
    files = {}
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        stat = (checkpoint.path / name).stat()
        # a copy that keeps its time of writing does not keep this one
        files[name] = f"{stat.st_size} bytes, changed at {stat.st_ctime_ns} ns"
    where = str(checkpoint.path)
    task = context.task(
        SOURCE_TASK, {"path": where, "headers": checkpoint.identity, "files": files}
    )
    done = context.once(task, lambda: _digest(context, task, checkpoint.num_layers + 1))
    parts: Any = done.info["result"]
    return ModelAt(checkpoint, parts[0], tuple(parts[1:]))


def _digest(context: Context, task: Task, parts: int) -> None:
    executor = context.executor
    calls = [executor.on(worker).digests(owned) for worker, owned in executor.shares(parts)]
    found: list[Any] = [part for done in executor.wait(calls) for part in done["digests"]]
    commit(task, [], {"result": found})
