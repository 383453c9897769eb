"""The sweep from the driver's side. Names and numbers pass through here; statistics and cuts go
from worker to worker.

On the pruned path, per layer and coupled group: collect, reduce, decide; then write the layer. On
the dense path all layers at once (`rayprune.orchestrator.stages.stream`); with `propagation: refit`
that pass only selects, and a second one on the pruned path corrects.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rayprune.orchestrator.execution.executor import Executor
from rayprune.orchestrator.execution.steps import Call, Collected, Decided, Steps
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.stream import layer_tasks, stream_layers
from rayprune.workers.store.files import Manifest
from rayprune.workers.store.layout import layer_task, selection_task
from rayprune.workers.store.shards import even_parts

if TYPE_CHECKING:
    from rayprune.workers.passes.sweep import Parts


def prune_layers(context: Context, tokens: Manifest) -> list[Manifest]:
    """Prune every layer that is not finished; the manifests of all of them.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    inputs = _inputs(context, tokens)
    if context.job.parallel.effective_propagation == "dense":
        shape, pad = context.plan.shape, context.job.export.pad
        sizes = [
            (shape.kept_in(layer), shape.written_in(layer, pad), shape.position(layer))
            for layer in range(len(inputs))
        ]
        return stream_layers(
            context,
            "sweep",
            layer_tasks(context, Steps.settle, layer_task, inputs, sizes, _lossy(context)),
        )
    if context.job.selects_first:
        selections = context.selections or select_units(context, tokens)
        inputs = [
            [*known, selection.digest] for known, selection in zip(inputs, selections, strict=True)
        ]
    return _pruned_path(context, inputs)


def select_units(context: Context, tokens: Manifest) -> list[Manifest]:
    """Select the units of all layers that stay, from activations of the dense model."""
    sizes = [(context.plan.shape.kept_in(layer),) for layer in range(context.plan.model.num_layers)]
    tasks = layer_tasks(
        context, Steps.select, selection_task, _inputs(context, tokens), sizes, _lossy(context)
    )
    return stream_layers(context, "select", tasks)


def _inputs(context: Context, tokens: Manifest) -> list[list[str]]:
    """What every layer depends on, beside the layers below."""
    layers, shape = range(context.plan.model.num_layers), context.plan.shape
    return [
        [*context.inputs(tokens), str(sorted(shape.kept_in(layer).items()))] for layer in layers
    ]


def _lossy(context: Context) -> list[list[str]]:
    """Of every layer the groups that lose units: on the dense path no other is decided."""
    return [context.plan.pruned_groups(layer) for layer in range(context.plan.model.num_layers)]


def _pruned_path(context: Context, inputs: Sequence[Sequence[str]]) -> list[Manifest]:
    """One layer after the other; a layer's fingerprint holds the digest of the layer below: it saw
    activations from there.
    """
    below: list[str] = []
    manifests: list[Manifest] = []
    with context.stage("sweep", context.plan.model.num_layers):
        for layer in range(context.plan.model.num_layers):
            expected = context.folder.fingerprint(layer_task(layer), *inputs[layer], *below)
            manifests.append(
                context.once(
                    layer_task(layer), expected, partial(_prune_layer, context, layer, expected)
                )
            )
            below = [manifests[-1].digest]
    return manifests


def _prune_layer(context: Context, layer: int, fingerprint: str) -> None:
    """One layer on the workers: statistics from all of them, decisions and writing by one, another
    for each layer.
    """
    executor, kept, start = context.executor, context.plan.shape.kept_in(layer), time.monotonic()
    written, position = (
        context.plan.shape.written_in(layer, context.job.export.pad),
        context.plan.shape.position(layer),
    )
    parts = even_parts(context.job.calibration.shards, executor.num_workers)
    writer = layer % executor.num_workers
    cuts: list[Decided] = []
    groups: dict[str, dict[str, Any]] = {}
    for name in context.plan.decided_groups(layer):
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
    executor.wait(
        [executor.on(writer).write_layer(layer, fingerprint, written, position, groups, *cuts)]
    )
    seconds = time.monotonic() - start
    context.emit(
        "step-finished",
        stage="sweep",
        layer=layer,
        seconds=seconds,
        groups=groups,
        peak_memory_bytes=context.peak_memory_bytes(),
    )


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
