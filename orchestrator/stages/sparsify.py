"""Zeros in the matrices of every layer, one layer after the other: a layer saw activations of the
sparse ones below.

Per site of a layer: statistics of what it reads from all workers, its zeros by one, another for
each layer; then the layer is written. The workers go past it when they are asked for the next.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rayprune.orchestrator.execution.steps import Handle
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.reduce import reduced
from rayprune.orchestrator.stages.subject import Subject
from rayprune.specs.methods.options import Masks
from rayprune.workers.store.files import Manifest, Task, fingerprint
from rayprune.workers.store.layout import layer_task

if TYPE_CHECKING:
    from rayprune.workers.passes.sparse import SparseSite


def sparsify_layers(context: Context, subject: Subject) -> list[Manifest]:
    """Make the zeros of every layer that is not finished; the manifests of all of them.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    masks, model, below = context.job.method.masks, subject.model, ""
    assert masks is not None
    finished: list[Manifest] = []
    with context.stage("sweep", subject.plan.model.num_layers):
        for layer in range(subject.plan.model.num_layers):
            depends = {
                "calibration-tokens": subject.tokens.digest,
                "headers": model.checkpoint.identity,
                "outer": model.outer_digest,
                "layer": model.layer_digests[layer],
                "layers below": below,
            }
            task = context.task(layer_task(layer), depends)
            done = context.once(task, partial(_sparsify, context, masks, layer, task))
            below = fingerprint([below, done.digest])
            finished.append(done)
    return finished


def _sparsify(context: Context, masks: Masks, layer: int, task: Task) -> None:
    """One layer on the workers."""
    executor, start = context.executor, time.monotonic()
    executor.seconds_since()
    decider = executor.on(layer % executor.num_workers)
    shards: Sequence[tuple[int, tuple[int, int]]] = executor.shares(context.job.calibration.shards)
    decided: list[Handle[SparseSite]] = []
    groups: dict[str, Any] = {}
    for site in masks.sites:
        collected = [
            executor.on(worker).collect_site(layer, site, owned, *decided)
            for worker, owned in shards
        ]
        executor.wait(collected)
        call = decider.decide_site(layer, site, *reduced(executor, collected))
        (receipt,) = executor.wait([call])
        groups[site] = receipt["group"]
        decided.append(call.payload)
    executor.wait([decider.write_sparse_layer(layer, task, groups, *decided)])
    took, by_step = time.monotonic() - start, executor.seconds_since()
    context.layer_finished("sweep", layer, took, by_step, groups)
