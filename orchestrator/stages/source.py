"""The stage that tells a model from others with tensors of the same names and sizes: it digests
every layer's values.

That reads the model once. It is repeated only where sizes or times of its files differ. From then
on no task is finished while a file of the model is another one than was digested.
"""

from functools import partial
from pathlib import Path

from rayprune.orchestrator.stages.context import Context, Watched, state_of
from rayprune.orchestrator.stages.subject import ModelAt
from rayprune.specs.errors import ModelError
from rayprune.specs.files import within
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.folder import INDEX_NAME
from rayprune.workers.store.files import Task, commit
from rayprune.workers.store.layout import SOURCE_TASK


def identify(context: Context, checkpoint: Checkpoint) -> ModelAt:
    """The model with digests of its values.

    Raises:
        ModelError: its config or index is a link that leads out of its folder.
    """
    path = checkpoint.path
    described = [path / name for name in ("config.json", INDEX_NAME)]
    described = [within(path, file) for file in described if file.exists()]
    names = sorted({info.file for info in checkpoint.tensors.values()})
    files = {name: state_of(path / name) for name in names}
    states = {path / name: state for name, state in files.items()}
    states |= {file: state_of(file) for file in described}
    inputs = {"path": str(path), "headers": checkpoint.identity, "files": files}
    task = context.task(SOURCE_TASK, inputs)
    done = context.once(task, lambda: _record(context, task, checkpoint))
    digests: list[str] = list(done.info["result"])  # type: ignore[call-overload]
    is_same = partial(_is_same, checkpoint, digests)
    context.watched[:] = [Watched(states, is_same)]
    return ModelAt(checkpoint, digests[0], tuple(digests[1:]), identified=True)


def _record(context: Context, task: Task, checkpoint: Checkpoint) -> None:
    commit(task, [], {"result": _digests(context, checkpoint)})


def _digests(context: Context, checkpoint: Checkpoint) -> list[str]:
    """Of what is outside the layers, and of every layer."""
    executor, path = context.executor, str(checkpoint.path)
    calls = [
        executor.on(worker).digests(path, owned)
        for worker, owned in executor.shares(checkpoint.num_layers + 1)
    ]
    return [part for done in executor.wait(calls) for part in done["digests"]]


def _is_same(checkpoint: Checkpoint, digests: list[str], context: Context) -> bool:
    """Whether the folder still holds the model that was digested."""
    try:
        if open_checkpoint(Path(checkpoint.path)).identity != checkpoint.identity:
            return False
        return context.attempt(SOURCE_TASK, partial(_digests, context, checkpoint)) == digests
    except (ModelError, OSError):
        return False
