"""The stage that chooses one shape of those that meet the budget."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

from rayprune.orchestrator.execution.steps import Call, Handle, Steps
from rayprune.orchestrator.planning.shapes import Shape
from rayprune.orchestrator.stages.allocate import allocate
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Subject
from rayprune.workers.store.files import Task, commit
from rayprune.workers.store.layout import SHAPE_TASK, probed_task
from rayprune.workers.store.shards import even_parts

if TYPE_CHECKING:
    from rayprune.workers.passes.sweep import Parts


def choose_shape(context: Context, subject: Subject) -> Shape:
    """The shape with the least predicted output error: mean over probed layers of each group's
    squared relative error.

    The dense model is run on a few calibration windows; errors are those of the method's own
    selection and correction, on held-out windows. Where layers may differ,
    `rayprune.orchestrator.stages.allocate` decides.
    """
    if context.job.budget.per_layer:
        return allocate(context, subject)
    if len(subject.plan.shapes) == 1:
        return subject.plan.shape
    shapes = [shape.facts() for shape in subject.plan.shapes]
    inputs = {**subject.all_of_it(), **subject.ranked_by, "shapes": shapes}
    task = context.task(SHAPE_TASK, inputs)
    done = context.once(task, lambda: _probe(context, subject, task))
    return Shape(**done.info["result"])  # type: ignore[arg-type]


def _probe(context: Context, subject: Subject, task: Task) -> None:
    """Predict the errors of all open shapes and record the best."""
    plan, num_layers = subject.plan, subject.plan.model.num_layers
    probed = [
        part.start
        for part in even_parts(num_layers, min(context.job.budget.probe_layers, num_layers))
    ]
    with context.stage("probe", len(probed)):
        predicted = [_probe_layer(context, subject, layer) for layer in probed]
    errors = [
        sum(layer[index] for layer in predicted) / len(predicted)
        for index in range(len(plan.shapes))
    ]
    best = plan.shapes[min(range(len(errors)), key=errors.__getitem__)]
    candidates = [
        shape.facts() | {"predicted_error": error}
        for shape, error in zip(plan.shapes, errors, strict=True)
    ]
    commit(
        task,
        [],
        {
            "result": best.facts(),
            "candidates": candidates,
            "computed_on": context.executor.computed_on,
        },
    )
    context.emit("shape-chosen", **best.facts(), candidates=candidates)


def _probe_layer(context: Context, subject: Subject, layer: int) -> list[float]:
    """Squared relative output error of every open shape at one layer, summed over its groups; of
    experts the mean of some. Which experts go is the same in all shapes.
    """
    plan, groups = subject.plan, subject.model.checkpoint.model.layers[layer].groups
    looked_at = {g.name: [m.name for m in g.probed] for g in groups}
    executor = context.executor
    pruned = {
        (group.name, shape.kept[group.name])
        for shape in plan.shapes
        for group in groups
        if group.kind != "experts" and shape.kept[group.name] < group.num_units
    }
    wanted = sorted((member, kept) for name, kept in pruned for member in looked_at[name])
    predict = _predictions(context, subject, layer)
    calls = [predict(executor.on(i % executor.num_workers), *unit) for i, unit in enumerate(wanted)]
    errors = dict(
        zip(
            wanted,
            (receipt["held_out_error"] ** 2 for receipt in executor.wait(calls)),
            strict=True,
        )
    )
    context.emit(
        "step-finished", stage="probe", layer=layer, peak_memory_bytes=context.peak_memory_bytes()
    )
    return [
        sum(
            fmean(errors.get((member, shape.kept[name]), 0.0) for member in members)
            for name, members in looked_at.items()
        )
        for shape in plan.shapes
    ]


def _predictions(
    context: Context, subject: Subject, layer: int
) -> Callable[[Steps, str, int], Call[None]]:
    """How to predict an error of a layer, once its statistics are there: kept in files where there
    is a store, since they are the same for every budget.
    """
    samples = context.job.budget.probe_samples
    held_out = max(1, samples // 4)

    def collected() -> list[Handle[dict[str, Parts]]]:
        executor = context.executor
        calls = [
            executor.on(worker).probe(layer, owned, held_out)
            for worker, owned in executor.shares(samples)
        ]
        executor.wait(calls)
        return [call.payload for call in calls]

    def keep(task: Task) -> None:
        steps = context.executor.on(0)
        context.executor.wait([steps.keep_probed(layer, task, held_out, *collected())])

    if context.store is None:
        parts = collected()
        return lambda steps, group, kept: steps.predict(layer, group, kept, held_out, *parts)
    task = context.task(probed_task(layer), subject.up_to(layer))
    context.once(task, lambda: keep(task))
    return lambda steps, group, kept: steps.predict_from_kept(layer, group, kept, str(task.folder))
