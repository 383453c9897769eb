"""What is done about a failure: a pure function, decided here and carried out by the driver."""

from enum import StrEnum

from rayprune.specs.errors import ResourceError


class Failure(StrEnum):
    """What was seen."""

    PROCESS_LOST = "a worker process, its node or its data was lost"
    PEER_LOST = "a worker has lost the others of its group"
    HUNG = "a worker has hung: it has come no further in time"
    OUT_OF_MEMORY = "a worker was stopped because its machine ran out of memory"
    UNSCHEDULABLE = "the cluster cannot start the workers"


class Decision(StrEnum):
    """What is done."""

    RETRY = "replace the worker and run the task again"
    STOP = "stop; finished tasks are kept"


ADVICE = {
    Failure.PROCESS_LOST: (
        "look at the worker's log, then run the same command again: finished tasks are kept"
    ),
    Failure.PEER_LOST: (
        "look at the workers' logs and at the network between their nodes; outside trainings"
        " parallel.transport: object-store needs no such group; finished tasks are kept"
    ),
    Failure.HUNG: (
        "where a step may take that long raise parallel.step_seconds, else look at the worker's"
        " node; finished tasks are kept"
    ),
    Failure.OUT_OF_MEMORY: (
        "lower parallel.micro_batch, set memory.worker, or use fewer workers per machine"
    ),
    Failure.UNSCHEDULABLE: "lower parallel.workers or parallel.threads_per_worker, or add nodes",
}


class WorkerFailure(Exception):  # noqa: N818 - a value for `decide`, not a verdict
    """A failure of the machinery under a worker; errors from our own or the user's code are never
    one.
    """

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(f"{failure.value}: {detail}")
        self.failure, self.detail = failure, detail


def decide(failure: Failure, failed_attempts: int, retries: int) -> Decision:
    """Only lost and hung processes are tried again, at most `retries` times."""
    may_pass = failure in (Failure.PROCESS_LOST, Failure.PEER_LOST, Failure.HUNG)
    return Decision.RETRY if may_pass and failed_attempts <= retries else Decision.STOP


def stopping_error(error: WorkerFailure, task: str, attempts: int) -> ResourceError:
    """The error a user sees when the decision is to stop."""
    return ResourceError(f"{task}: {error} (attempt {attempts}); {ADVICE[error.failure]}")
