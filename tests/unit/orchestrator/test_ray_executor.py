"""Which Ray errors are failures of the machinery, and which are a step's own."""

from pathlib import Path

import pytest
import ray
from ray import exceptions as ray_errors

from rayprune.orchestrator.execution.failures import Failure
from rayprune.orchestrator.execution.ray_executor import RayExecutor, classify
from rayprune.specs.errors import ModelError, ResourceError
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from tests.conftest import MakeJob, MakeModel


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


def test_an_address_where_nobody_listens(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ray.is_initialized():
        pytest.skip("this process has a Ray already, which executors then use")
    job = load_job(make_job(make_model()), ["cluster.executor=ray", "cluster.address=127.0.0.1:1"])
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray itself waits for minutes"))
    with pytest.raises(ResourceError, match=r"cluster\.address '127\.0\.0\.1:1': cannot connect"):
        RayExecutor(job, tmp_path, lambda _: MemoryPlan()).start()
