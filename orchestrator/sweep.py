"""The sweep from the driver's side. Names and numbers pass through here; statistics and cuts go from worker to worker.

On the pruned path, per layer and coupled group: collect, reduce, decide; then write the layer. On the dense path all
layers at once (`orchestrator.stream`); with `propagation: refit` that pass only selects, and a second one on the pruned
path corrects.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from orchestrator.context import Context
from orchestrator.executor import Call, Executor
from orchestrator.stream import LayerTask, stream_layers
from workers.files import Manifest
from workers.layout import layer_task, selection_task
from workers.shards import even_parts


def prune_layers(context: Context, tokens: Manifest) -> list[Manifest]:
    """Prune every layer that is not finished; the manifests of all of them.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    layers, shape = range(context.plan.model.num_layers), context.plan.shape
    inputs = [[tokens.digest, context.checkpoint.identity, str(sorted(shape.kept_in(layer).items()))] for layer in layers]
    match context.job.parallel.effective_propagation:
        case "dense":
            return stream_layers(context, "sweep", _settled(context, layer_task, inputs))
        case "refit":
            selections = stream_layers(context, "select", _settled(context, selection_task, inputs))
            return _pruned_path(context, [[*known, selection.digest] for known, selection in zip(inputs, selections, strict=True)])
        case _:
            return _pruned_path(context, inputs)


def _settled(context: Context, name: Callable[[int], str], inputs: Sequence[Sequence[str]]) -> list[LayerTask]:
    """The tasks of the dense path: what is decided there, of the groups that lose units."""
    shape, pad, tasks = context.plan.shape, context.job.export.pad, []
    for layer, known in enumerate(inputs):
        sizes = (shape.kept_in(layer), shape.written_in(layer, pad))
        expected = context.folder.fingerprint(name(layer), *known)
        tasks.append(LayerTask(name(layer), expected, "settle", sizes, context.plan.pruned_groups(layer)))
    return tasks


def _pruned_path(context: Context, inputs: Sequence[Sequence[str]]) -> list[Manifest]:
    """One layer after the other; a layer's fingerprint holds the digest of the layer below: it saw activations from there."""
    below: list[str] = []
    manifests: list[Manifest] = []
    with context.stage("sweep", context.plan.model.num_layers):
        for layer in range(context.plan.model.num_layers):
            expected = context.folder.fingerprint(layer_task(layer), *inputs[layer], *below)
            manifests.append(context.once(layer_task(layer), expected, partial(_prune_layer, context, layer, expected)))
            below = [manifests[-1].digest]
    return manifests


def _prune_layer(context: Context, layer: int, fingerprint: str) -> None:
    """One layer on the workers: statistics from all of them, decisions and writing by one, another for each layer."""
    executor, kept, start = context.executor, context.plan.shape.kept_in(layer), time.monotonic()
    written = context.plan.shape.written_in(layer, context.job.export.pad)
    parts = even_parts(context.job.calibration.shards, executor.num_workers)
    writer = layer % executor.num_workers
    cuts: list[Any] = []
    groups: dict[str, dict[str, Any]] = {}
    for name in context.plan.decided_groups(layer):
        collected = [executor.submit(worker, "collect", layer, name, (part.start, part.stop), *cuts) for worker, part in enumerate(parts)]
        executor.wait(collected)
        decision = executor.submit(writer, "decide", layer, name, kept[name], *_reduced(executor, collected))
        (receipt,) = executor.wait([decision])
        groups[name] = receipt["group"]
        cuts.append(decision.payload)
    executor.wait([executor.submit(writer, "write_layer", layer, fingerprint, written, groups, *cuts)])
    seconds = time.monotonic() - start
    context.emit("step-finished", stage="sweep", layer=layer, seconds=seconds, groups=groups, peak_memory_bytes=context.peak_memory_bytes())


def _reduced(executor: Executor, calls: Sequence[Call]) -> list[Any]:
    """The statistics of all workers, merged in pairs from worker to worker until two payloads are left."""
    while len(calls) > 2:
        pairs = [calls[start : start + 2] for start in range(0, len(calls), 2)]
        calls = [executor.submit(p[0].worker, "reduce", *(call.payload for call in p)) if len(p) == 2 else p[0] for p in pairs]
        executor.wait(calls)
    return [call.payload for call in calls]
