"""The stage that gives every layer its number of units: a survey on the dense path, measured
divergences, curves, search.

The survey is one pass over the dense model (`stages.stream`). Divergences of whole models are
measured by all workers, each on its part of the windows; what follows from the numbers is decided
in `stages.spread`.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVarTuple

from rayprune.orchestrator.execution.steps import Call, Steps
from rayprune.orchestrator.planning.shapes import Shape, uneven_shape
from rayprune.orchestrator.planning.workload import CANDIDATES_AT_ONCE
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.spread import (
    Budget,
    Kept,
    Losses,
    Spread,
    above_threshold,
    cheapest,
    filled,
    levels,
    mutated,
    predicted_loss,
)
from rayprune.orchestrator.stages.stream import layer_tasks, stream_layers
from rayprune.specs.allocation import CurvesAllocation, SearchAllocation
from rayprune.workers.store.files import Manifest, commit
from rayprune.workers.store.layout import (
    SENSITIVITY_TASK,
    SHAPE_TASK,
    generation_task,
    survey_task,
    task_folder,
)

Ts = TypeVarTuple("Ts")


def allocate(context: Context, tokens: Manifest) -> Shape:
    """The shape with units of its own for every layer, as `budget.allocation` says.

    Raises:
        SpecError: no allocation within its bounds meets the budget.
    """
    allocation = context.job.budget.allocation
    base = context.inputs(tokens)
    if isinstance(allocation, CurvesAllocation):
        budget = _bounded(context, allocation)
        surveys, losses = _losses(context, budget, allocation, base)
        inputs = [survey.digest for survey in surveys]
        decide = partial(_best_spread, context, budget, allocation, losses, inputs)
    else:
        surveys = _scores(context, base)
        inputs = [survey.digest for survey in surveys]
        decide = partial(_threshold, context, surveys)
    expected = context.folder.fingerprint(SHAPE_TASK, *inputs)
    done = context.once(SHAPE_TASK, expected, lambda: _commit_shape(context, expected, *decide()))
    return Shape(**done.info["result"])  # type: ignore[arg-type]


def _commit_shape(
    context: Context, expected: str, spread: Spread, facts: Mapping[str, object]
) -> None:
    shape = uneven_shape(context.job, context.checkpoint, spread)
    context.emit("layers-allocated", layers=spread, **facts)
    commit(
        task_folder(context.folder.path, SHAPE_TASK),
        SHAPE_TASK,
        expected,
        [],
        {"result": asdict(shape), "allocation": dict(facts)},
    )


def _fixed(context: Context) -> Kept:
    """Units that the job itself gives to every layer."""
    asked, groups = context.job.budget.kv_groups, context.checkpoint.model.groups
    fixed = {group.name: group.num_units for group in groups if group.fixed}
    attention = context.checkpoint.model.names_of("attention")
    return fixed if asked == "auto" else fixed | dict.fromkeys(attention, asked)


def _mean_removed(context: Context) -> float:
    """Decoder parameters that a layer loses on average: those of the planned shape."""
    dense = context.checkpoint.decoder_parameters
    return (dense - context.plan.shapes[0].decoder_parameters) / context.plan.model.num_layers


# scores


def _scores(context: Context, inputs: Sequence[str]) -> list[Manifest]:
    fraction = context.plan.shapes[0].decoder_parameters / context.checkpoint.decoder_parameters
    kept = {name: count * fraction for name, count in context.plan.model.units.items()}
    return _survey(context, Steps.score, inputs, kept)


def _survey(
    context: Context,
    step: Callable[[Steps, int, str, *Ts], Call[None]],
    inputs: Sequence[str],
    *arguments: *Ts,
) -> list[Manifest]:
    layers, groups = context.plan.model.num_layers, list(context.plan.model.units)
    tasks = layer_tasks(
        context, step, survey_task, [inputs] * layers, [arguments] * layers, [groups] * layers
    )
    return stream_layers(context, "survey", tasks)


def _threshold(context: Context, surveys: Sequence[Manifest]) -> tuple[Spread, dict[str, object]]:
    cost, fixed = _unit_parameters(context), _fixed(context)
    scores = [context.job.method.weighted_scores(_result(survey), cost) for survey in surveys]
    scores = [
        {name: units for name, units in groups.items() if name not in fixed} for groups in scores
    ]
    return above_threshold(Budget(context.job, context.checkpoint), scores, fixed), {}


def _result(manifest: Manifest) -> dict[str, Any]:
    result = manifest.info["result"]
    assert isinstance(result, dict)
    return result


# error curves, and how much they matter


def _bounded(context: Context, allocation: CurvesAllocation) -> Budget:
    mean = _mean_removed(context)
    return Budget(context.job, context.checkpoint, allocation.least * mean, allocation.most * mean)


def _unit_parameters(context: Context) -> dict[str, int]:
    """Parameters of one unit, by group."""
    return {group.name: group.unit_parameters for group in context.checkpoint.model.groups}


def _counts(context: Context, budget: Budget, allocation: CurvesAllocation) -> dict[str, list[int]]:
    """For every group the numbers of units that a layer may keep, descending, without all of
    them.
    """
    units, cost, round_to = (
        context.plan.model.units,
        _unit_parameters(context),
        context.job.budget.round_to,
    )
    stepped = context.checkpoint.model.names_of("ffn")
    counts = {
        name: levels(
            count, cost[name], budget.most, round_to if name in stepped else 1, allocation.levels
        )
        for name, count in units.items()
    }
    return counts | {
        name: [count] if count < units[name] else [] for name, count in _fixed(context).items()
    }


def _losses(
    context: Context, budget: Budget, allocation: CurvesAllocation, inputs: Sequence[str]
) -> tuple[list[Manifest], Losses]:
    """The surveys, and for every layer and group the predicted divergence by number of units that
    stay.
    """
    counts, planned = _counts(context, budget, allocation), context.plan.shapes[0].kept
    reference = {
        name: min(known, key=lambda count: (count == 0, abs(count - planned[name])))
        for name, known in counts.items()
        if known
    }
    searched = isinstance(allocation, SearchAllocation) or bool(_fixed(context))
    stored = (
        counts
        if searched
        else {name: [reference[name]] if known else [] for name, known in counts.items()}
    )
    surveys = _survey(context, Steps.survey, inputs, counts, stored)
    alone = [
        (layer, name, count) for layer in range(len(surveys)) for name, count in reference.items()
    ]
    expected = context.folder.fingerprint(SENSITIVITY_TASK, *(survey.digest for survey in surveys))
    done = context.once(
        SENSITIVITY_TASK, expected, lambda: _measure_alone(context, alone, expected)
    )
    found: Any = done.info["result"]
    measured = dict(zip(alone, found, strict=True))
    units = context.plan.model.units | _fixed(context)
    losses: list[dict[str, dict[int, float]]] = []
    for layer, survey in enumerate(surveys):
        losses.append({name: {count: 0.0} for name, count in units.items()})
        for name, count in reference.items():
            errors = {int(number): error for number, error in _result(survey)[name].items()}
            scale = measured[layer, name, count] / max(errors[count], 1e-12)
            losses[layer][name] |= _falling(
                {number: scale * errors[number] for number in counts[name] if number < units[name]}
            )
    return surveys, losses


def _falling(curve: Mapping[int, float]) -> dict[int, float]:
    """A curve by falling number of units, without the noise that would make a loss smaller where
    fewer units stay.
    """
    losses = itertools.accumulate(curve.values(), max)
    return dict(zip(curve, losses, strict=True))


def _measure_alone(context: Context, alone: Sequence[tuple[int, str, int]], expected: str) -> None:
    num_layers = context.plan.model.num_layers
    candidates: list[Spread] = [
        [{name: count} if index == layer else {} for index in range(num_layers)]
        for layer, name, count in alone
    ]
    with context.stage("sensitivity", math.ceil(len(candidates) / CANDIDATES_AT_ONCE)):
        found = _measured(context, candidates, "sensitivity")
    commit(
        task_folder(context.folder.path, SENSITIVITY_TASK),
        SENSITIVITY_TASK,
        expected,
        [],
        {"result": found},
    )


def _measured(context: Context, candidates: Sequence[Spread], stage: str) -> list[float]:
    """The divergence from the dense model (nats per token) of every candidate; the same for any
    number of workers.
    """
    executor, found = context.executor, list[float]()
    for start in range(0, len(candidates), CANDIDATES_AT_ONCE):
        some = candidates[start : start + CANDIDATES_AT_ONCE]
        calls = [
            executor.on(worker).divergences(some, owned)
            for worker, owned in executor.shares(context.job.divergence_windows)
        ]
        sums = [receipt["sums"] for receipt in executor.wait(calls)]
        tokens = context.job.divergence_windows * context.job.calibration.sequence_length
        found += [
            math.fsum(value for part in sums for value in part[index]) / tokens
            for index in range(len(some))
        ]
        context.emit(
            "candidates-measured",
            stage=stage,
            done=len(found),
            of=len(candidates),
            peak_memory_bytes=context.peak_memory_bytes(),
        )
    return found


# search


def _best_spread(
    context: Context,
    budget: Budget,
    allocation: CurvesAllocation,
    losses: Losses,
    inputs: Sequence[str],
) -> tuple[Spread, dict[str, object]]:
    spread = cheapest(budget, losses)
    facts: dict[str, object] = {"predicted_divergence": predicted_loss(losses, spread)}
    if isinstance(allocation, SearchAllocation):
        spread, found = _search(context, budget, allocation, losses, spread, inputs)
        facts |= found
    return filled(budget, spread, losses), facts


def _search(
    context: Context,
    budget: Budget,
    allocation: SearchAllocation,
    losses: Losses,
    spread: Spread,
    inputs: Sequence[str],
) -> tuple[Spread, dict[str, object]]:
    """Generation after generation, each a task of its own: a search that was cut off goes on behind
    the last one that ended.
    """
    history: list[float] = []
    below = list(inputs)
    with context.stage("search", allocation.generations):
        for number in range(allocation.generations):
            task = generation_task(number)
            expected = context.folder.fingerprint(task, *below)
            parent = spread
            done = context.once(
                task,
                expected,
                partial(_generation, context, budget, allocation, losses, parent, number, expected),
            )
            below = [done.digest]
            result = _result(done)
            spread = result["spread"]
            history.append(result["divergence"])
            context.emit("step-finished", stage="search", generation=number, divergence=history[-1])
    tokens = context.job.divergence_windows * context.job.calibration.sequence_length
    candidates = 1 + allocation.generations * allocation.offspring
    return spread, {
        "divergence": history[-1],
        "by_generation": history,
        "candidates": candidates,
        "tokens_per_candidate": tokens,
    }


def _generation(
    context: Context,
    budget: Budget,
    allocation: SearchAllocation,
    losses: Losses,
    parent: Spread,
    number: int,
    expected: str,
) -> None:
    """The parent and its offspring are measured; the best one is the next parent, the parent itself
    if none is better.
    """
    chance = random.Random(f"{allocation.seed}-{number}")
    children = [mutated(budget, parent, losses, chance) for _ in range(allocation.offspring)]
    found = _measured(context, [parent, *children], "search")
    best = min(range(len(found)), key=found.__getitem__)
    result = {
        "spread": [parent, *children][best],
        "divergence": found[best],
        "parent_divergence": found[0],
    }
    commit(
        task_folder(context.folder.path, generation_task(number)),
        generation_task(number),
        expected,
        [],
        {"result": result},
    )
