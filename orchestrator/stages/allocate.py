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
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVarTuple

from rayprune.orchestrator.execution.steps import Call, Steps
from rayprune.orchestrator.planning.rounding import asked_units
from rayprune.orchestrator.planning.shapes import Shape, uneven_shape
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.divergence import (
    every_text,
    measure_alone,
    measured,
    objective,
    text_names,
)
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
from rayprune.orchestrator.stages.stream import layer_work, stream_layers
from rayprune.orchestrator.stages.subject import Subject, digests, file_digests
from rayprune.orchestrator.stages.survey import Counts, asked, survey_experts
from rayprune.specs.allocation import CurvesAllocation, SearchAllocation
from rayprune.specs.budget import SPEEDS
from rayprune.workers.model.description import Group
from rayprune.workers.store.files import Manifest, Task, commit
from rayprune.workers.store.layout import SENSITIVITY_TASK, SHAPE_TASK, generation_task, survey_task

Ts = TypeVarTuple("Ts")


def allocate(context: Context, subject: Subject) -> Shape:
    """The shape with units of its own for every layer, as `budget.allocation` says.

    Raises:
        SpecError: no allocation within its bounds meets the budget.
    """
    allocation, inputs = context.job.budget.allocation, _limits(context, subject)
    if isinstance(allocation, CurvesAllocation):
        budget = _bounded(context, subject, allocation)
        tasks, predicted = _losses(context, subject, budget, allocation)
        inputs |= tasks
        losses = predicted.losses
        spread = cheapest(budget, losses)
        facts: dict[str, object] = {"predicted_divergence": predicted_loss(losses, spread)}
        if len(predicted.by_text) > 1:
            alone = {name: predicted_loss(of, spread) for name, of in predicted.by_text.items()}
            facts["predicted_by_text"] = alone
        if isinstance(allocation, SearchAllocation):
            spread, found, last = _search(context, budget, allocation, losses, spread, inputs)
            facts, inputs = facts | found, inputs | digests([last])
        decide = partial(_filled, budget, losses, spread, facts)
    else:
        surveys = _scores(context, subject)
        inputs |= digests(surveys)
        decide = partial(_threshold, context, subject, surveys)
    task = context.task(SHAPE_TASK, inputs)
    done = context.once(task, lambda: _commit_shape(context, subject, task, *decide()))
    return Shape(**done.info["result"])  # type: ignore[arg-type]


def _limits(context: Context, subject: Subject) -> dict[str, object]:
    """What the budget is counted with."""
    budget, headers = context.job.budget, subject.model.checkpoint.identity
    table = (
        {"latency_table": file_digests([Path(budget.latency_table)])}
        if budget.latency_table and any(getattr(budget, name) for name in SPEEDS)
        else {}
    )
    return {"headers": headers, **table}


def _commit_shape(
    context: Context, subject: Subject, task: Task, spread: Spread, facts: Mapping[str, object]
) -> None:
    shape = uneven_shape(context.job, subject.model.checkpoint, spread)
    context.emit("layers-allocated", layers=shape.layers, **facts)
    info = {"result": shape.facts(), "allocation": dict(facts)}
    commit(task, [], info | {"computed_on": context.executor.computed_on})


def _fixed(context: Context, subject: Subject) -> Kept:
    """Units that the job itself, or the model's form, gives to every layer."""
    model = subject.model.checkpoint.model
    fixed = {group.name: group.num_units for group in model.groups if group.fixed}
    return fixed | asked_units(context.job, model)


def _mean_removed(subject: Subject) -> float:
    """Decoder parameters that a layer loses on average: those of the planned shape."""
    dense, plan = subject.model.checkpoint.decoder_parameters, subject.plan
    return (dense - plan.shapes[0].decoder_parameters) / plan.model.num_layers


# scores


def _scores(context: Context, subject: Subject) -> list[Manifest]:
    plan, dense = subject.plan, subject.model.checkpoint.decoder_parameters
    fraction = plan.shapes[0].decoder_parameters / dense
    kept = {name: count * fraction for name, count in plan.model.units.items()}
    return _survey(
        context, subject, Steps.score, lambda groups: ({g.name: kept[g.name] for g in groups},)
    )


def _survey(
    context: Context,
    subject: Subject,
    step: Callable[[Steps, int, Task, *Ts], Call[None]],
    asked: Callable[[Sequence[Group]], tuple[*Ts]],
) -> list[Manifest]:
    """A pass over the dense model; `asked` says what of a layer's groups."""
    work = [
        layer_work(
            context,
            subject,
            number,
            survey_task(number),
            step,
            asked(layer.groups),
            [group.name for group in layer.groups],
            **subject.ranked_by,
        )
        for number, layer in enumerate(subject.model.checkpoint.model.layers)
    ]
    return stream_layers(context, subject, "survey", work)


def _threshold(
    context: Context, subject: Subject, surveys: Sequence[Manifest]
) -> tuple[Spread, dict[str, object]]:
    cost, fixed = _unit_parameters(subject), _fixed(context, subject)
    scores = [context.job.method.weighted_scores(_result(survey), cost) for survey in surveys]
    scores = [
        {name: units for name, units in groups.items() if name not in fixed} for groups in scores
    ]
    return above_threshold(Budget(context.job, subject.model.checkpoint), scores, fixed), {}


def _result(manifest: Manifest) -> dict[str, Any]:
    result = manifest.info["result"]
    assert isinstance(result, dict)
    return result


# error curves, and how much they matter


@dataclass(frozen=True)
class _Predicted:
    """What units cost of the objective, and on each text, by its name."""

    losses: Losses
    by_text: Mapping[str, Losses]


def _bounded(context: Context, subject: Subject, allocation: CurvesAllocation) -> Budget:
    mean = _mean_removed(subject)
    least, most = allocation.least * mean, allocation.most * mean
    return Budget(context.job, subject.model.checkpoint, least, most)


def _unit_parameters(subject: Subject) -> dict[str, int]:
    """Parameters of one unit, by group, at most: in all experts, and with the units of a layer that
    follow it.
    """
    cost: dict[str, int] = {}
    for layer, _ in subject.model.checkpoint.model.alike:
        own = {group.name: group.count * group.unit_parameters for group in layer.groups}
        for group in layer.groups:
            if group.times:
                leader, times = group.times
                own[leader] = own.get(leader, 0) + times * own[group.name]
        cost |= {name: max(each, cost.get(name, 0)) for name, each in own.items()}
    return cost


def _counts(
    context: Context, subject: Subject, budget: Budget, allocation: CurvesAllocation
) -> dict[str, list[int]]:
    """For every group the numbers of units that a layer may keep, descending, without all of them;
    none for a group that follows another.
    """
    units, cost = subject.plan.model.units, _unit_parameters(subject)
    counts: dict[str, list[int]] = {}
    for group in subject.model.checkpoint.model.groups:
        name, most, step = group.name, budget.most_with(group.name), budget.steps[group.name]
        found = levels(units[name], cost[name], most, step, allocation.levels)
        least = group.fewest if group.kind == "experts" else int(group.some_stay)
        counts[name] = [] if group.times else [count for count in found if count >= least]
    fixed = _fixed(context, subject)
    return counts | {name: [n] if n < units[name] else [] for name, n in fixed.items()}


def _reference(subject: Subject, counts: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """For every group the number of units to which it is cut alone: as the planned shape says, of
    experts, which stay in that, the fraction that stays of everything.
    """
    shape, model = subject.plan.shapes[0], subject.model.checkpoint.model
    planned = dict(shape.kept)
    stays = shape.decoder_parameters / subject.model.checkpoint.decoder_parameters
    for name in model.names_of("experts"):
        planned[name] = round(planned[name] * stays)
    return {
        name: min(known, key=lambda count: (count == 0, abs(count - planned[name])))
        for name, known in counts.items()
        if known
    }


def _losses(
    context: Context, subject: Subject, budget: Budget, allocation: CurvesAllocation
) -> tuple[dict[str, str], _Predicted]:
    """What was measured, and for every layer and group the predicted divergence by number of units
    that stay.
    """
    counts = _counts(context, subject, budget, allocation)
    reference, model = _reference(subject, counts), subject.model.checkpoint.model
    searched = isinstance(allocation, SearchAllocation) or bool(_fixed(context, subject))
    stored = (
        counts
        if searched
        else {name: [reference[name]] if known else [] for name, known in counts.items()}
    )

    def of_groups(groups: Sequence[Group]) -> tuple[Counts, Counts]:
        return asked(groups, counts), asked(groups, stored)

    surveys = (
        survey_experts(context, subject, counts, stored)
        if model.experts
        else _survey(context, subject, Steps.survey, of_groups)
    )
    places = [
        (layer, name, count)
        for layer in range(len(surveys))
        for name, count in reference.items()
        if model.led_by(name, layer)
    ]
    task = context.task(
        SENSITIVITY_TASK, {**subject.all_of_it(), "alone": places, **digests(surveys)}
    )
    done = context.once(task, lambda: measure_alone(context, len(surveys), places, task))
    found: Any = done.info["result"]
    alone = dict(zip(places, map(every_text, found), strict=True))
    units = subject.plan.model.units | _fixed(context, subject)

    def curves(counted: Callable[[Sequence[float]], float]) -> Losses:
        """Of the divergences of all texts what is counted."""
        losses: list[dict[str, dict[int, float]]] = []
        for layer, survey in enumerate(surveys):
            losses.append({name: {count: 0.0} for name, count in units.items()})
            for name, count in reference.items():
                if (layer, name, count) not in alone:
                    continue
                led, times = model.led_by(name, layer) or (name, 1)
                found = _result(survey)[led].items()
                errors = {int(number) // times: error for number, error in found}
                loss = counted(alone[layer, name, count])  # rounding may take it below 0
                matters = math.copysign(abs(loss) ** allocation.influence, loss)
                scale = matters / max(errors[count], 1e-12)
                known = [number for number in counts[name] if number < units[name]]
                losses[layer][name] |= _falling({n: scale * errors[n] for n in known})
        return losses

    names = text_names(context.job.calibration)
    by_text = {name: curves(itemgetter(number)) for number, name in enumerate(names)}
    counted = partial(objective, allocation)
    return digests([*surveys, done]), _Predicted(curves(counted), by_text)


def _falling(curve: Mapping[int, float]) -> dict[int, float]:
    """A curve by falling number of units, without the noise that would make a loss smaller where
    fewer units stay.
    """
    losses = itertools.accumulate(curve.values(), max)
    return dict(zip(curve, losses, strict=True))


# search


def _filled(
    budget: Budget, losses: Losses, spread: Spread, facts: dict[str, object]
) -> tuple[Spread, dict[str, object]]:
    return filled(budget, spread, losses), facts


def _search(
    context: Context,
    budget: Budget,
    allocation: SearchAllocation,
    losses: Losses,
    spread: Spread,
    inputs: Mapping[str, object],
) -> tuple[Spread, dict[str, object], Manifest]:
    """Generation after generation, each a task of its own: a search that was cut off goes on behind
    the last one that ended. The best allocation, what is to be told of it, and the last task.
    """
    history: list[float] = []
    below: dict[str, str] = {}
    with context.stage("search", allocation.generations):
        for number in range(allocation.generations):
            task = context.task(generation_task(number), {**inputs, **below})
            work = partial(_generation, context, budget, allocation, losses, spread, number, task)
            done = context.once(task, work)
            below, result = digests([done]), _result(done)
            spread = result["spread"]
            history.append(result["divergence"])
            context.emit("step-finished", stage="search", generation=number, divergence=history[-1])
    tokens = context.job.divergence_windows * context.job.calibration.sequence_length
    facts: dict[str, object] = {
        "divergence": history[-1],
        "by_generation": history,
        "candidates": 1 + allocation.generations * allocation.offspring,
        "tokens_per_candidate": tokens,
    }
    if by_text := _result(done).get("by_text"):
        names = text_names(context.job.calibration)
        facts["divergence_by_text"] = dict(zip(names, by_text, strict=True))
    return spread, facts, done


def _generation(
    context: Context,
    budget: Budget,
    allocation: SearchAllocation,
    losses: Losses,
    parent: Spread,
    number: int,
    task: Task,
) -> None:
    """The parent and its offspring are measured; the best one is the next parent, the parent itself
    if none is better.
    """
    chance = random.Random(f"{allocation.seed}-{number}")
    children = [mutated(budget, parent, losses, chance) for _ in range(allocation.offspring)]
    by_text = measured(context, [parent, *children], "search")
    found = [objective(allocation, each) for each in by_text]
    best = min(range(len(found)), key=found.__getitem__)
    result = {
        "spread": [parent, *children][best],
        "divergence": found[best],
        "parent_divergence": found[0],
    }
    if len(by_text[best]) > 1:
        result["by_text"] = by_text[best]
    commit(task, [], {"result": result, "computed_on": context.executor.computed_on})
