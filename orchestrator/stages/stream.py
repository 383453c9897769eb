"""`placement: layers`, and layers that are trained alone: chunks of consecutive layers on all
workers at once, micro-batches flowing from chunk to chunk.

A wave is one chunk per worker. Within a wave hidden states go from worker to worker, at most
MICRO_BATCHES_AT_ONCE micro-batches ahead of the slowest; where a wave ends they are written to
files, from which a restart goes on. Once a wave's micro-batches are through, all its layers are
decided at the same time, each by the worker that has its statistics.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVarTuple

from rayprune.orchestrator.execution.steps import Call, States, Steps
from rayprune.orchestrator.planning.workload import MICRO_BATCHES_AT_ONCE
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.reads import BOUNDARY
from rayprune.orchestrator.stages.subject import Subject
from rayprune.workers.store.files import Manifest, Task, read_manifest
from rayprune.workers.store.layout import RESIDUAL_STREAM, boundary_file, statistics_task
from rayprune.workers.store.shards import even_parts, num_micro_batches

Wave = list[range]
Ts = TypeVarTuple("Ts")


def waves(layers: range, num_workers: int, layers_per_chunk: int) -> list[Wave]:
    """Layers as waves of at most `num_workers` chunks of at most `layers_per_chunk` layers, as even
    as can be.
    """
    count = math.ceil(len(layers) / (num_workers * layers_per_chunk))
    parts = (
        [layers[part.start : part.stop] for part in even_parts(len(layers), count)]
        if layers
        else []
    )
    return [
        [part[chunk.start : chunk.stop] for chunk in even_parts(len(part), num_workers) if chunk]
        for part in parts
    ]


@dataclass(frozen=True)
class LayerWork:
    """What is done with a layer's statistics once they are complete: a step of the worker that has
    them.
    """

    task: Task
    step: Callable[..., Call[None]]
    """A method of `Steps`; it takes the layer, the task and `arguments`."""
    arguments: tuple[Any, ...]
    groups: Sequence[str]
    """The groups whose statistics it needs."""


def layer_work(
    context: Context,
    subject: Subject,
    layer: int,
    name: str,
    step: Callable[[Steps, int, Task, *Ts], Call[None]],
    arguments: tuple[*Ts],
    groups: Sequence[str],
    **inputs: object,
) -> LayerWork:
    """Work on a layer, with all that it depends on."""
    depends = {**subject.up_to(layer), **inputs, "arguments": arguments, "groups": list(groups)}
    return LayerWork(context.task(name, depends), step, arguments, groups)


def stream_layers(
    context: Context, subject: Subject, stage: str, work: Sequence[LayerWork]
) -> list[Manifest]:
    """Do the work on every layer from activations of the model as it is.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    missing = _unfinished(context, work, range(len(work)))
    groups = {name for layer in missing for name in work[layer].groups}
    kept: list[LayerWork] = []
    if context.store and RESIDUAL_STREAM not in groups:
        kept = _keep_statistics(
            context, subject, [layer for layer in missing if work[layer].groups]
        )
    with context.stage(stage, len(work)):
        for layer in sorted(set(range(len(work))) - set(missing)):
            context.emit("task-found", task=context.scope.task(work[layer].task.name))
        if kept:
            _work_on_kept(context, stage, work, kept, missing)
        else:
            _stream(context, subject, stage, work, missing)
    return [_manifest(work[layer]) for layer in range(len(work))]


def _stream(
    context: Context,
    subject: Subject,
    stage: str,
    work: Sequence[LayerWork],
    missing: Sequence[int],
) -> None:
    """Wave after wave, as far as the last layer that is missing."""
    if not missing:
        return
    first = _first_layer(context, subject, missing[0])
    for wave in waves(
        range(first, missing[-1] + 1),
        context.executor.num_workers,
        subject.plan.memory.layers_per_chunk,
    ):
        name = f"layers {wave[0].start} to {wave[-1].stop - 1}"
        context.attempt(name, partial(_run_wave, context, subject, stage, wave, work, set(missing)))


def _keep_statistics(context: Context, subject: Subject, layers: Sequence[int]) -> list[LayerWork]:
    """Where there is a store: statistics of all groups of these layers as tasks of their own. Those
    that are there already take no forward pass.
    """
    kept = [
        layer_work(
            context,
            subject,
            number,
            statistics_task(number),
            Steps.keep_statistics,
            (groups := [group.name for group in layer.groups],),
            groups,
        )
        for number, layer in enumerate(subject.model.checkpoint.model.layers)
    ]
    absent = [layer for layer in layers if context.finished(kept[layer].task) is None]
    with context.stage("statistics", len(absent)):
        _stream(context, subject, "statistics", kept, absent)
    return kept


def _work_on_kept(
    context: Context,
    stage: str,
    work: Sequence[LayerWork],
    kept: Sequence[LayerWork],
    missing: Sequence[int],
) -> None:
    """Work on layers from their kept statistics, one on each worker at a time."""
    at_once = context.executor.num_workers
    for start in range(0, len(missing), at_once):
        some = missing[start : start + at_once]
        name = f"layers {some[0]} to {some[-1]}"
        context.attempt(name, partial(_work_at_once, context, stage, work, kept, some))


def _work_at_once(
    context: Context,
    stage: str,
    work: Sequence[LayerWork],
    kept: Sequence[LayerWork],
    layers: Sequence[int],
) -> None:
    """One layer on each worker."""
    executor, start = context.executor, time.monotonic()
    executor.seconds_since()
    calls = []
    for worker, layer in enumerate(layers):
        todo, folder = work[layer], str(kept[layer].task.folder)
        steps = executor.on(worker)
        loaded = steps.load_statistics(layer, folder, list(todo.groups))
        calls.append((loaded, todo.step(steps, layer, todo.task, *todo.arguments)))
    for layer, call in zip(layers, calls, strict=True):
        _, receipt = executor.wait(call)
        context.done(work[layer].task)
        took, by_step = time.monotonic() - start, executor.seconds_since()
        context.layer_finished(stage, layer, took, by_step, receipt["groups"])


def _manifest(work: LayerWork) -> Manifest:
    done = read_manifest(work.task.folder)
    assert done is not None, f"{work.task.name} left no manifest"
    return done


def _unfinished(context: Context, work: Sequence[LayerWork], layers: Sequence[int]) -> list[int]:
    return [layer for layer in layers if context.finished(work[layer].task) is None]


def _num_batches(context: Context, subject: Subject) -> int:
    calibration, size = context.job.calibration, context.job.parallel.micro_batch
    if subject.goal:
        return num_micro_batches(context.job.recovery_text.samples, 1, size, 1)
    return num_micro_batches(calibration.samples, calibration.shards, size, calibration.shards)


def _before(context: Context, subject: Subject, layer: int) -> Path:
    """The folder of hidden states before a layer; its name holds what they depend on."""
    made = context.task(BOUNDARY, subject.up_to(layer - 1)).fingerprint
    path = "pruned" if subject.goal else "dense"
    return context.scope.cache / f"{path}-{layer:04d}-{made[:16]}"


def _first_layer(context: Context, subject: Subject, missing: int) -> int:
    """The last layer, at most `missing`, before which all hidden states are at hand, as they were
    written.
    """
    return next(
        (layer for layer in range(missing, 0, -1) if _is_at_hand(context, subject, layer)), 0
    )


def _is_at_hand(context: Context, subject: Subject, layer: int) -> bool:
    folder, count = _before(context, subject, layer), _num_batches(context, subject)
    if not all(boundary_file(folder, number).exists() for number in range(count)):
        return False

    def check() -> bool:
        executor = context.executor
        calls = [
            executor.on(worker).remove_damaged(str(folder), owned)
            for worker, owned in executor.shares(count)
        ]
        return all(receipt["whole"] for receipt in executor.wait(calls))

    return context.attempt(f"hidden states before layer {layer}", check)


def _run_wave(
    context: Context,
    subject: Subject,
    stage: str,
    wave: Wave,
    work: Sequence[LayerWork],
    wanted: Collection[int],
) -> None:
    """Statistics of the wave's unfinished layers, then the work on them."""
    executor, start = context.executor, time.monotonic()
    executor.seconds_since()
    inside = [layer for chunk in wave for layer in chunk if layer in wanted]
    missing = _unfinished(context, work, inside)
    _flow(context, subject, wave, {layer: work[layer].groups for layer in missing})
    settled = [
        (layer, todo.step(executor.on(place), layer, todo.task, *todo.arguments))
        for place, chunk in enumerate(wave)
        for layer, todo in ((layer, work[layer]) for layer in chunk if layer in missing)
    ]
    # in the order in which they end
    for layer, call in sorted(settled, key=lambda item: item[0] - wave[item[1].worker].start):
        (receipt,) = executor.wait([call])
        context.done(work[layer].task)
        took, by_step = time.monotonic() - start, executor.seconds_since()
        context.layer_finished(stage, layer, took, by_step, receipt["groups"])


def _flow(context: Context, subject: Subject, wave: Wave, wanted: dict[int, Sequence[str]]) -> None:
    """Send all micro-batches through the wave: at each step every chunk works on the one its
    predecessor has just left.
    """
    executor, count = context.executor, _num_batches(context, subject)
    entering = _before(context, subject, wave[0].start)
    leaving = _before(context, subject, wave[-1].stop)
    handed: list[States | None] = [None] * len(wave)
    under_way: deque[list[Call[Any]]] = deque()
    for step in range(count + len(wave) - 1 + MICRO_BATCHES_AT_ONCE):
        if step >= MICRO_BATCHES_AT_ONCE:
            executor.wait(under_way.popleft())
            _report(context, step - MICRO_BATCHES_AT_ONCE - len(wave) + 1, count)
        calls = []
        for place in reversed(range(len(wave))):
            if 0 <= (number := step - place) < count:
                chunk, last = wave[place], place == len(wave) - 1
                before = handed[place - 1] if place else None
                saved = entering, (leaving if last else None)
                calls.append(
                    executor.on(place).flow(
                        (chunk.start, chunk.stop), number, wanted, saved, before, subject.goal
                    )
                )
                handed[place] = calls[-1].payload
        under_way.append(calls)


def _report(context: Context, number: int, count: int) -> None:
    """An event at every tenth of the way: this micro-batch has left the wave."""
    if number >= 0 and (number + 1) * 10 // count > number * 10 // count:
        context.emit("micro-batches", done=number + 1, of=count)
