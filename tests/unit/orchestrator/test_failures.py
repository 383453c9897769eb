"""The failure policy, as a table."""

import pytest

from rayprune.orchestrator.execution.failures import (
    ADVICE,
    Decision,
    Failure,
    WorkerFailure,
    decide,
    stopping_error,
)
from rayprune.specs.errors import RaypruneError, ResourceError


@pytest.mark.parametrize(
    ("failure", "failed_attempts", "retries", "decision"),
    [
        (Failure.PROCESS_LOST, 1, 0, Decision.STOP),
        (Failure.PROCESS_LOST, 1, 1, Decision.RETRY),
        (Failure.PROCESS_LOST, 2, 1, Decision.STOP),
        (Failure.PROCESS_LOST, 2, 2, Decision.RETRY),
        (Failure.PROCESS_LOST, 3, 2, Decision.STOP),
        (Failure.HUNG, 1, 1, Decision.RETRY),
        (Failure.HUNG, 2, 1, Decision.STOP),
        (Failure.OUT_OF_MEMORY, 1, 100, Decision.STOP),
        (Failure.UNSCHEDULABLE, 1, 100, Decision.STOP),
    ],
)
def test_decide(failure: Failure, failed_attempts: int, retries: int, decision: Decision) -> None:
    assert decide(failure, failed_attempts, retries) is decision


@pytest.mark.parametrize("failure", list(Failure))
def test_every_failure_stops_in_the_end_with_advice(failure: Failure) -> None:
    error = stopping_error(WorkerFailure(failure, "worker 3 on 10.0.0.7"), "layer-0004", 2)
    assert isinstance(error, ResourceError)
    assert str(error).startswith("layer-0004: ")
    for words in (failure.value, "worker 3 on 10.0.0.7", "attempt 2", ADVICE[failure]):
        assert words in str(error)


def test_a_worker_failure_is_no_error_of_the_users() -> None:
    assert not isinstance(WorkerFailure(Failure.PROCESS_LOST, "gone"), RaypruneError)
