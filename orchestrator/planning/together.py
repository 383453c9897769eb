"""What several passes over a model take together."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, replace

from rayprune.orchestrator.planning.costs import Traffic
from rayprune.orchestrator.planning.memory_choice import MemoryNeeds
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.timing import Stage
from rayprune.orchestrator.planning.worker_memory import total


def relative_sparsity(sparsity: float, original: int, current: int) -> float:
    """The fraction of `current` parameters whose removal leaves at most the part `1 - sparsity` of
    the `original` ones; not above 0 where no more are left.

    Half a parameter is let go of, so that no rounding decides about one that is whole.
    """
    most = math.floor((1 - sparsity) * original + 1e-6)
    return 1 - (most + 0.5) / current


def needs_together(needs: Sequence[MemoryNeeds]) -> MemoryNeeds:
    """The most that any pass needs."""
    by_step: dict[str, dict[str, int]] = {}
    for need in needs:
        for name, kinds in need.memory_by_step.items():
            by_step[name] = max(by_step.get(name, {}), kinds, key=total)
    fewest = [need.fewest_workers for need in needs]
    keeping = [need.fewest_workers_keeping_all for need in needs]
    return MemoryNeeds(
        memory_limit_bytes=needs[0].memory_limit_bytes,
        memory_by_step=by_step,
        worker_memory_bytes=max(need.worker_memory_bytes for need in needs),
        host_memory_bytes=max(need.host_memory_bytes for need in needs),
        fewest_workers=None if None in fewest else max(n for n in fewest if n),
        fewest_workers_keeping_all=None if None in keeping else max(n for n in keeping if n),
    )


def stages_together(plans: Sequence[Plan]) -> Iterator[Stage]:
    """The stages of all passes, by name; each is bound by what bounds the longest of its own."""
    for name in dict.fromkeys(stage.name for plan in plans for stage in plan.stages):
        own = [stage for plan in plans for stage in plan.stages if stage.name == name]
        longest = max(own, key=lambda stage: stage.seconds or 0.0)
        seconds = seconds_together([stage.seconds for stage in own])
        yield Stage(name, sum(stage.flops for stage in own), seconds, longest.bound_by)


def of_stages(plan: Plan, names: Collection[str]) -> Plan:
    """A plan of these of its stages alone."""
    stages = tuple(stage for stage in plan.stages if stage.name in names)
    seconds = seconds_together([stage.seconds for stage in stages])
    return replace(plan, stages=stages, seconds=seconds)


def seconds_together(seconds: Sequence[float | None]) -> float | None:
    """The sum of what is known; None: nothing is."""
    known = [each for each in seconds if each is not None]
    return sum(known) if known else None


def traffic_together(plans: Sequence[Plan]) -> Traffic:
    """What all of them send, read and write."""
    return Traffic(*map(sum, zip(*(astuple(plan.traffic) for plan in plans), strict=True)))
