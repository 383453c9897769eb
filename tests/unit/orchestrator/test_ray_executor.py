"""Which Ray errors are failures of the machinery, and which are a step's own."""

from pathlib import Path

import pytest
import ray
from ray import exceptions as ray_errors

from rayprune.orchestrator.execution.failures import Failure, WorkerFailure
from rayprune.orchestrator.execution.ray_executor import RayExecutor
from rayprune.orchestrator.execution.ray_failures import classify, translated
from rayprune.orchestrator.execution.steps import Call, Handle
from rayprune.specs.errors import ModelError, ResourceError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from tests.conftest import MakeJob, MakeModel

JOB = JobSpec.model_validate({"model": {"path": "/m"}, "calibration": {"path": "/c"}})


def task_error(cause: Exception) -> ray_errors.RayTaskError:
    """What Ray raises when a step raised `cause`."""
    return ray_errors.RayTaskError("step", "traceback", cause)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ray_errors.ActorDiedError(), Failure.PROCESS_LOST),
        (ray_errors.ActorUnavailableError("gone", None), Failure.PROCESS_LOST),
        (ray_errors.NodeDiedError("node"), Failure.PROCESS_LOST),
        (ray_errors.ObjectLostError("00" * 28, None, ""), Failure.PROCESS_LOST),
        (ray_errors.OwnerDiedError("00" * 28, None, ""), Failure.PROCESS_LOST),
        (ray_errors.WorkerCrashedError(), Failure.PROCESS_LOST),
        (ray_errors.GetTimeoutError(), Failure.PROCESS_LOST),
        (task_error(ray_errors.ObjectLostError("00" * 28, None, "")), Failure.PROCESS_LOST),
        (ray_errors.OutOfMemoryError("memory"), Failure.OUT_OF_MEMORY),
        (ray_errors.ActorUnschedulableError("no node"), Failure.UNSCHEDULABLE),
        (task_error(ValueError("a bug")), None),
        (task_error(ModelError("a bad model")), None),
        (ValueError("not from Ray"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_classify(error: Exception, failure: Failure | None) -> None:
    assert classify(error) is failure


class Ping:
    """A call that Ray would make of an actor."""

    def remote(self) -> "Ping":
        return self


class Actor:
    """As much of an actor as is asked whether it lives."""

    def __init__(self) -> None:
        self.__ray_ready__ = Ping()


def test_workers_whose_steps_do_not_end_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told by the steps that are waited for: the stopped one, not the busy one."""
    monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr(ray, "get", lambda *_, **__: None)
    killed: list[object] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    executor = RayExecutor(JOB, tmp_path, lambda _: MemoryPlan())
    monkeypatch.setattr(executor, "_new_actor", Actor)
    monkeypatch.setattr(executor, "_ready", lambda _: None)
    old = executor._actors = [Actor() for _ in range(3)]
    executor.step_limit = 0.02
    with pytest.raises(WorkerFailure, match=r"worker-1 \(collect\): nothing for 0 s") as caught:
        executor.wait([Call(1, "collect", "receipt", Handle())])
    assert caught.value.failure is Failure.HUNG
    busy = [old[0], old[2]]
    assert executor.replace_lost() == [1]
    assert len(killed) == 1
    assert [executor._actors[0], executor._actors[2]] == busy
    assert killed[0] not in executor._actors
    assert executor.replace_lost() == []


@pytest.mark.parametrize("cause", ["ImportError: this torch is not torch", "ResourceError: no GPU"])
def test_an_error_in_the_constructor_is_shown_at_once(cause: str) -> None:
    words = (
        "The actor died because of an error raised in its creation task, ray::Worker.__init__()"
        " (pid=7, ip=10.0.0.7, actor_id=a, repr=<x>)\n"
        f'  File "/home/me/torch.py", line 1, in <module>\n{cause}'
    )
    error = ray_errors.RayActorError("a", words, actor_init_failed=True)
    shown = translated(error)
    assert isinstance(shown, ResourceError)
    for part in ("node 10.0.0.7", cause, "/home/me/torch.py", "every node needs"):
        assert part in str(shown)


def test_an_address_where_nobody_listens(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ray.is_initialized():
        pytest.skip("this process has a Ray already, which executors then use")
    job = load_job(make_job(make_model()), ["cluster.executor=ray", "cluster.address=127.0.0.1:1"])
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray itself waits for minutes"))
    with pytest.raises(ResourceError, match=r"cluster\.address '127\.0\.0\.1:1': cannot connect"):
        RayExecutor(job, tmp_path, lambda _: MemoryPlan()).start()
