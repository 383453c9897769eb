"""What every stage stands on: tasks are found, or done again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.execution.executor import InProcessExecutor
from rayprune.orchestrator.execution.run_folder import RunFolder
from rayprune.orchestrator.stages.context import Context
from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.files import MANIFEST_NAME, Task, commit, write_text
from rayprune.workers.store.layout import EXPORT_TASK, Scope, layer_task
from tests.conftest import edit_json

JOB = JobSpec.model_validate({"model": {"path": "/m"}, "calibration": {"path": "/c"}})


@pytest.fixture
def events() -> list[dict[str, Any]]:
    """What was shown."""
    return []


@pytest.fixture(params=["", "step-02"])
def context(
    request: pytest.FixtureRequest, events: list[dict[str, Any]], tmp_path: Path
) -> Iterator[Context]:
    """Over an empty folder."""
    with RunFolder(tmp_path, JOB) as folder:
        executor = InProcessExecutor(JOB, tmp_path, MemoryPlan())
        yield Context(JOB, folder, executor, events.append, Scope(tmp_path, request.param))


def finish(task: Task) -> None:
    write_text(task.folder / "artifact", "content")
    commit(task, ["artifact"], {"n": 1})


DAMAGES: dict[str, Callable[[Task], object]] = {
    "a file is edited": lambda task: (task.folder / "artifact").write_text("c0ntent"),
    "a file is missing": lambda task: (task.folder / "artifact").unlink(),
    "the manifest is torn": lambda task: (task.folder / MANIFEST_NAME).write_text("{"),
    "what it tells is edited": lambda task: edit_json(task.folder / MANIFEST_NAME, info={"n": 2}),
    "it hides its files": lambda task: edit_json(task.folder / MANIFEST_NAME, files={}),
    "it has no digest": lambda task: edit_json(task.folder / MANIFEST_NAME, sha256=None),
}


@pytest.mark.parametrize("name", [layer_task(0), EXPORT_TASK])
def test_finished(name: str, context: Context, events: list[dict[str, Any]]) -> None:
    task, other = context.task(name, {"text": "a"}), context.task(name, {"text": "b"})
    assert context.finished(task) is None
    finish(task)
    done = context.finished(task)
    assert done is not None
    assert done.info == {"n": 1}
    for damage in DAMAGES.values():
        damage(task)
        for _ in range(2):
            assert context.finished(task) is None
        (damaged,) = events  # told once
        assert (damaged["event"], damaged["task"]) == ("task-damaged", context.scope.task(name))
        events.clear()
        finish(task)
    assert context.finished(other) is None
    assert not task.folder.exists()
    (stale,) = events
    assert stale["task"] == context.scope.task(name)
    assert stale["changed"] == ['text: "a" -> "b"']


def test_what_cannot_be_redone_is_kept(context: Context) -> None:
    task = context.task(layer_task(0), {"text": "a"})
    finish(task)

    def refuse() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        context.finished(context.task(layer_task(0), {"text": "b"}), refuse)
    assert context.finished(task) is not None
