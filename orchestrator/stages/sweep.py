"""The sweep from the driver's side. Names and numbers pass through here; statistics and cuts go
from worker to worker.

On the pruned path, per layer and coupled group: collect, reduce, decide; then write the layer. On
the dense path all layers at once (`rayprune.orchestrator.stages.stream`); with `propagation: refit`
that pass only selects, and a second one on the pruned path corrects.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rayprune.orchestrator.execution.executor import Executor
from rayprune.orchestrator.execution.steps import Call, Collected, Decided, Steps
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.stream import layer_work, stream_layers
from rayprune.orchestrator.stages.subject import Subject
from rayprune.workers.store.files import Manifest, Task, fingerprint
from rayprune.workers.store.layout import layer_task, selection_task
from rayprune.workers.store.shards import even_parts

if TYPE_CHECKING:
    from rayprune.workers.passes.sweep import Parts


def prune_layers(context: Context, subject: Subject) -> list[Manifest]:
    """Prune every layer that is not finished; the manifests of all of them.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    if context.job.parallel.effective_propagation == "dense":
        return _dense_path(context, subject)
    if context.job.selects_first and subject.selections is None:
        subject = replace(subject, selections=tuple(select_units(context, subject)))
    return _pruned_path(context, subject)


def _dense_path(context: Context, subject: Subject) -> list[Manifest]:
    shape, pad, work = subject.plan.shape, context.job.export.pad, []
    for layer in range(subject.plan.model.num_layers):
        sizes = shape.kept_in(layer), shape.written_in(layer, pad), shape.position(layer)
        groups = subject.plan.pruned_groups(layer)  # on the dense path no other is decided
        work.append(
            layer_work(
                context,
                subject,
                layer,
                layer_task(layer),
                Steps.settle,
                sizes,
                groups,
                **subject.ranked_by,
            )
        )
    return stream_layers(context, subject, "sweep", work)


def select_units(context: Context, subject: Subject) -> list[Manifest]:
    """Select the units of all layers that stay, from activations of the dense model."""
    work = []
    for layer in range(subject.plan.model.num_layers):
        kept, groups = subject.plan.shape.kept_in(layer), subject.plan.pruned_groups(layer)
        name, ranked_by = selection_task(layer), subject.ranked_by
        work.append(
            layer_work(context, subject, layer, name, Steps.select, (kept,), groups, **ranked_by)
        )
    return stream_layers(context, subject, "select", work)


def _pruned_path(context: Context, subject: Subject) -> list[Manifest]:
    """One layer after the other; a layer depends on all layers below it: it saw activations from
    there.
    """
    below = ""
    manifests: list[Manifest] = []
    with context.stage("sweep", subject.plan.model.num_layers):
        for layer in range(subject.plan.model.num_layers):
            task = context.task(layer_task(layer), _depends(context, subject, layer, below))
            work = partial(_prune_layer, context, subject.plan, layer, task)
            manifests.append(context.once(task, work))
            below = fingerprint([below, manifests[-1].digest, manifests[-1].info["kept"]])
    return manifests


def _depends(context: Context, subject: Subject, layer: int, below: str) -> dict[str, object]:
    """What a layer depends on, where activations come from the pruned layers `below`."""
    shape, model, selections = subject.plan.shape, subject.model, subject.selections
    depends: dict[str, object] = {
        "calibration-tokens": subject.tokens.digest,
        "headers": model.checkpoint.identity,
        "outer": model.outer_digest,
        "layer": model.layer_digests[layer],
        "layers below": below,
        "kept": shape.kept_in(layer),
        "written": shape.written_in(layer, context.job.export.pad),
        "position": shape.position(layer),
        **subject.ranked_by,
    }
    if selections:
        depends["selection"] = selections[layer].digest
    if context.job.correction.drift:
        depends["dense"] = model.up_to(layer)
    return depends


def _prune_layer(context: Context, plan: Plan, layer: int, task: Task) -> None:
    """One layer on the workers: statistics from all of them, decisions and writing by one, another
    for each layer.
    """
    executor, kept, start = context.executor, plan.shape.kept_in(layer), time.monotonic()
    written, position = (
        plan.shape.written_in(layer, context.job.export.pad),
        plan.shape.position(layer),
    )
    parts = even_parts(context.job.calibration.shards, executor.num_workers)
    writer = layer % executor.num_workers
    cuts: list[Decided] = []
    groups: dict[str, dict[str, Any]] = {}
    for name in plan.decided_groups(layer):
        shards = [
            (worker, (part.start, part.stop)) for worker, part in enumerate(parts) if kept[name]
        ]
        collected = [
            executor.on(worker).collect(layer, name, owned, *cuts) for worker, owned in shards
        ]
        executor.wait(collected)
        decision = executor.on(writer).decide(
            layer, name, kept[name], *_reduced(executor, collected)
        )
        (receipt,) = executor.wait([decision])
        groups[name] = receipt["group"]
        cuts.append(decision.payload)
    executor.wait([executor.on(writer).write_layer(layer, task, written, position, groups, *cuts)])
    context.layer_finished("sweep", layer, start, groups)


def _reduced(executor: Executor, calls: Sequence["Call[Parts]"]) -> list[Collected]:
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
