"""Statistics on their way from all workers to the one that decides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayprune.orchestrator.execution.executor import Executor
from rayprune.orchestrator.execution.steps import Call, Collected

if TYPE_CHECKING:
    from rayprune.workers.passes.sweep import Parts


def reduced(executor: Executor, calls: Sequence["Call[Parts]"]) -> list[Collected]:
    """The statistics of all workers, merged in pairs from worker to worker until two payloads are
    left.
    """
    while len(calls) > 2:
        pairs = [calls[start : start + 2] for start in range(0, len(calls), 2)]
        calls = [
            (
                executor.on(p[0].worker).reduce(*(call.payload for call in p))
                if len(p) == 2
                else p[0]
            )
            for p in pairs
        ]
        executor.wait(calls)
    return [call.payload for call in calls]
