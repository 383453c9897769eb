"""The sweep from the driver's side: per layer and coupled group collect, decide; then write the layer.

Names and numbers pass through here; statistics and cuts go from worker to worker behind handles.
"""

import time
from functools import partial
from typing import Any

from orchestrator.context import Context
from workers.config_patch import patched_config
from workers.files import Manifest
from workers.layout import layer_task
from workers.shards import even_parts


def prune_layers(context: Context, tokens: Manifest) -> list[Manifest]:
    """Prune every layer that is not finished, in order; the manifests of all of them.

    A layer's fingerprint holds the digest of the layer below: it saw activations from there.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    plan, below = context.plan, [tokens.digest, context.checkpoint.identity, str(sorted(context.plan.shape.kept.items()))]
    manifests: list[Manifest] = []
    with context.stage("sweep", plan.num_layers):
        for layer in range(plan.num_layers):
            expected = context.folder.fingerprint(layer_task(layer), *below)
            manifests.append(context.once(layer_task(layer), expected, partial(_prune_layer, context, layer, expected)))
            below = [manifests[-1].digest]
    return manifests


def _prune_layer(context: Context, layer: int, fingerprint: str) -> None:
    """One layer on the workers: statistics from all of them, decisions and writing by one, another for each layer."""
    executor, kept, start = context.executor, context.plan.shape.kept, time.monotonic()
    parts = even_parts(context.job.calibration.shards, executor.num_workers)
    writer = layer % executor.num_workers
    cuts: list[Any] = []
    groups: dict[str, dict[str, Any]] = {}
    for name in context.plan.pruned_groups():
        collected = [executor.submit(worker, "collect", layer, name, (part.start, part.stop), *cuts) for worker, part in enumerate(parts)]
        executor.wait(collected)
        decision = executor.submit(writer, "decide", layer, name, kept[name], *(call.payload for call in collected))
        (receipt,) = executor.wait([decision])
        groups[name] = {key: value for key, value in receipt.items() if key not in ("seconds", "peak_memory_bytes")}
        cuts.append(decision.payload)
    config = patched_config(context.checkpoint.config, kept, context.job.export.target, context.job.export.dtype)
    executor.wait([executor.submit(writer, "write_layer", layer, fingerprint, config, {"groups": groups}, *cuts)])
    seconds = time.monotonic() - start
    context.emit("step-finished", stage="sweep", layer=layer, seconds=seconds, groups=groups, peak_memory_bytes=context.peak_memory_bytes())
