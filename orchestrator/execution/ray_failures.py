"""What Ray's errors mean: failures of the machinery, and a step's own errors."""

import re

from ray import exceptions as ray_errors

from rayprune.orchestrator.execution.failures import Failure, WorkerFailure
from rayprune.specs.errors import LostPeerError, ResourceError

_LOST = (
    ray_errors.RayActorError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
    ray_errors.WorkerCrashedError,
    ray_errors.LocalRayletDiedError,
    ray_errors.RaySystemError,
    ray_errors.OwnerDiedError,
    ray_errors.GetTimeoutError,
)


def classify(error: BaseException) -> Failure | None:
    """The failure behind an exception, or None when it is the step's own error (a task error is a
    RayError too).
    """
    if isinstance(error, ray_errors.RayTaskError):
        # a lost argument is found out inside the step that needs it
        cause = getattr(error, "cause", None)
        if isinstance(cause, LostPeerError):
            return Failure.PEER_LOST
        return Failure.PROCESS_LOST if isinstance(cause, _LOST) else None
    if isinstance(error, ray_errors.OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if isinstance(error, _LOST):
        return Failure.PROCESS_LOST
    if isinstance(error, (ray_errors.ActorUnschedulableError, ray_errors.TaskUnschedulableError)):
        return Failure.UNSCHEDULABLE
    return None


def translated(error: ray_errors.RayError) -> BaseException:
    """What a step, or the start of a worker, has failed with."""
    if isinstance(error, ray_errors.RayActorError) and error.actor_init_failed:
        return _cannot_begin(error)
    failure = classify(error)
    if failure is not None:
        return WorkerFailure(failure, str(error).splitlines()[0])
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def _cannot_begin(error: ray_errors.RayActorError) -> ResourceError:
    """A worker's own error in its constructor: another try would meet it again."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ")]
    node = found[1] if (found := re.search(r"ip=([^,)\s]+)", str(error))) else "unknown"
    return ResourceError(
        f"a worker cannot begin on node {node}: {lines[-1]} ({', '.join(places[-1:])}); every node"
        " needs the driver's packages, in the same versions, and no file or folder of their names"
        " in the current folder or on PYTHONPATH"
    )
