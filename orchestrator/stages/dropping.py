"""Whole layers that go without training: chosen, left out, and then the rest is pruned.

Where heads or widths go after them, the model without the layers is a folder of its own, in the
scope `layers`, and everything behind is one pass over that.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rayprune.orchestrator.planning.dropped import droppable, layers_job, left_by, rest_of, whole
from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.planning.workload import CANDIDATES_AT_ONCE
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.export import export_model
from rayprune.orchestrator.stages.prune import begin, cut, end, noting
from rayprune.orchestrator.stages.subject import ModelAt, Pruned, Subject
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Manifest, Task, commit
from rayprune.workers.store.layout import (
    EXPORT_TASK,
    OUTER_TASK,
    WHOLE_LAYERS,
    Scope,
    dropped_task,
    layer_task,
)


def prune_without_layers(context: Context, plan: Plan, checkpoint: Checkpoint) -> Pruned:
    """Leave out whole layers, then prune what is left as far as the budget asks for.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    context, subject, evaluated = begin(context, plan, checkpoint)
    job, executor, original = context.job, context.executor, subject.model
    gone, measured = _chosen(context, subject)
    left = left_by(job, checkpoint, gone)
    rest = rest_of(job, checkpoint, left)
    scope = Scope(context.scope.run, WHOLE_LAYERS) if rest else context.scope
    writing = replace(context, job=layers_job(job, rest is None), scope=scope)
    executor.use_model(writing.job, checkpoint.path, scope.name)
    shorter = replace(subject, plan=subject.plan.chosen(left))
    told = {"layers": gone, "score": job.budget.drop_score if measured else None, **measured}
    if rest is None:
        context.record(shorter.plan)
        done = end(context, shorter, _write(writing, shorter), evaluated, original)
        return replace(done, dropped=told)
    model = _shorter_model(writing, shorter)
    inner = make_plan(rest, model.checkpoint, device=executor.device_kind)
    executor.memory_on = lambda _: inner.memory
    executor.use_model(rest, model.path, context.scope.name)
    there = left.remaining(checkpoint.num_layers)
    widths = replace(subject, plan=inner, model=model, numbers=there)
    done = cut(replace(context, job=rest), widths, evaluated, original)
    shape = whole(done.plan.shape, there, checkpoint.num_layers)
    layers: list[Any] = [{} for _ in range(checkpoint.num_layers)]
    for number, layer in enumerate(there):
        layers[layer] = done.layers[number]
    plan = noting(context, subject.plan.chosen(shape), done.plan.notes)
    return replace(done, plan=context.record(plan), layers=layers, dropped=told)


# which layers


def _chosen(context: Context, subject: Subject) -> tuple[list[int], dict[str, Any]]:
    """The layers that go, ascending, and what was measured to choose them."""
    budget = context.job.budget
    asked, may_go = budget.drop_layers, droppable(context.job, subject.model.checkpoint)
    if isinstance(asked, list):
        return sorted(asked), {}
    assert asked is not None
    if budget.drop_score == "influence":
        task = context.task(dropped_task(0), {**subject.all_of_it(), "score": "influence"})
        found: Any = context.once(task, partial(_influences, context, task)).info["result"]
        order = sorted(may_go, key=lambda layer: (found[layer], layer))
        return sorted(order[:asked]), {"influence": found}
    gone, course = list[int](), list[float]()
    for number in range(asked):
        candidates = [[*gone, layer] for layer in may_go if layer not in gone]
        inputs = {**subject.all_of_it(), "score": "divergence", "candidates": candidates}
        task = context.task(dropped_task(number), inputs)
        work = partial(_divergences, context, task, candidates)
        measured: Any = context.once(task, work).info["result"]
        best = min(range(len(candidates)), key=measured.__getitem__)
        gone, course = candidates[best], [*course, measured[best]]
        context.emit("layer-dropped", layer=gone[-1], divergence=course[-1], of=asked)
    return sorted(gone), {"order": gone, "divergence": course}


def _influences(context: Context, task: Task) -> None:
    """Of every layer the mean over all tokens; the same for any number of workers."""
    executor, windows = context.executor, context.job.drop_windows
    with context.stage("influence", 1):
        calls = [
            executor.on(worker).influences(owned) for worker, owned in executor.shares(windows)
        ]
        sums = [window for receipt in executor.wait(calls) for window in receipt["sums"]]
    tokens = windows * context.job.calibration.sequence_length
    result = [math.fsum(window[layer] for window in sums) / tokens for layer in range(len(sums[0]))]
    commit(task, [], {"result": result, "computed_on": executor.computed_on})


def _divergences(context: Context, task: Task, candidates: Sequence[Sequence[int]]) -> None:
    """Of every candidate the mean over all tokens; the same for any number of workers."""
    executor, windows, result = context.executor, context.job.drop_windows, list[float]()
    tokens = windows * context.job.calibration.sequence_length
    with context.stage("divergence", math.ceil(len(candidates) / CANDIDATES_AT_ONCE)):
        for start in range(0, len(candidates), CANDIDATES_AT_ONCE):
            some = candidates[start : start + CANDIDATES_AT_ONCE]
            calls = [
                executor.on(worker).without_layers(some, owned)
                for worker, owned in executor.shares(windows)
            ]
            sums = [receipt["sums"] for receipt in executor.wait(calls)]
            result += [
                math.fsum(value for part in sums for value in part[number]) / tokens
                for number in range(len(some))
            ]
    commit(task, [], {"result": result, "computed_on": executor.computed_on})


# leaving them out


def _shorter_model(context: Context, subject: Subject) -> ModelAt:
    """The model without the layers, in a folder of the context's scope."""
    alone = make_plan(
        context.job,
        subject.model.checkpoint,
        device=context.executor.device_kind,
        given=(subject.plan.shape,),
    )
    # texts and source are those of the whole run
    made = {*map(layer_task, range(subject.model.checkpoint.num_layers)), OUTER_TASK, EXPORT_TASK}
    alone = replace(alone, tasks=tuple(task for task in alone.tasks if task in made))
    subject = replace(subject, plan=context.record(alone))
    return export_model(context, subject, _write(context, subject))


def _write(context: Context, subject: Subject) -> list[Manifest]:
    """The layers that stay, as they are, one on each worker at a time; of one that goes, a record
    alone.
    """
    shape, model = subject.plan.shape, subject.model
    tasks = [
        context.task(
            layer_task(layer),
            {
                "headers": model.checkpoint.identity,
                "layer": model.layer_digests[layer],
                "position": shape.position(layer),
            },
        )
        for layer in range(model.checkpoint.num_layers)
    ]
    found = [context.finished(task) for task in tasks]
    for task in (task for task, done in zip(tasks, found, strict=True) if done):
        context.emit("task-found", task=context.scope.task(task.name))
    missing = [layer for layer, done in enumerate(found) if done is None]
    at_once = context.executor.num_workers
    with context.stage("write", len(tasks)):
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            work = partial(_write_some, context, subject, {layer: tasks[layer] for layer in some})
            context.attempt(layer_task(some[0]), work)
            for layer in some:
                found[layer] = context.done(tasks[layer])
    return [done for done in found if done]


def _write_some(context: Context, subject: Subject, tasks: dict[int, Task]) -> None:
    executor, began = context.executor, time.monotonic()
    units, shape = subject.model.checkpoint.model.units, subject.plan.shape
    executor.seconds_since()
    executor.wait(
        [
            executor.on(worker).write_layer(layer, task, units, shape.position(layer), {})
            for worker, (layer, task) in enumerate(tasks.items())
        ]
    )
    executor.wait([executor.on(worker).finish_writing() for worker in range(len(tasks))])
    seconds, steps = time.monotonic() - began, executor.seconds_since()
    for layer in tasks:
        context.layer_finished("write", layer, seconds, steps, {})
