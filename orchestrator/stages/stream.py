"""`placement: layers`: chunks of consecutive layers on all workers at once, micro-batches flowing
from chunk to chunk.

A wave is one chunk per worker. Within a wave hidden states go from worker to worker, at most
MICRO_BATCHES_AT_ONCE micro-batches ahead of the slowest; where a wave ends they are written to
files, from which a restart goes on. Once a wave's micro-batches are through, all its layers are
decided at the same time, each by the worker that has its statistics.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVarTuple

from rayprune.orchestrator.execution.steps import Call, States, Steps
from rayprune.orchestrator.planning.workload import MICRO_BATCHES_AT_ONCE
from rayprune.orchestrator.stages.context import Context
from rayprune.workers.store.files import Manifest
from rayprune.workers.store.layout import boundary_file
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
class LayerTask:
    """What is done with a layer's statistics once they are complete: a step of the worker that has
    them.
    """

    name: str
    fingerprint: str
    start: Callable[[Steps], Call[None]]
    """Starts the step on a worker."""
    groups: Sequence[str]
    """The groups whose statistics it needs."""


def layer_tasks(
    context: Context,
    step: Callable[[Steps, int, str, *Ts], Call[None]],
    name: Callable[[int], str],
    inputs: Sequence[Sequence[str]],
    arguments: Sequence[tuple[*Ts]],
    groups: Sequence[Sequence[str]],
) -> list[LayerTask]:
    """One task for each layer, with what it depends on beside the layers below."""
    names = [name(layer) for layer in range(len(inputs))]
    prints = [
        context.folder.fingerprint(task, *known) for task, known in zip(names, inputs, strict=True)
    ]
    return [
        LayerTask(
            names[layer],
            prints[layer],
            _started(step, layer, prints[layer], arguments[layer]),
            groups[layer],
        )
        for layer in range(len(inputs))
    ]


def _started(
    step: Callable[[Steps, int, str, *Ts], Call[None]],
    layer: int,
    fingerprint: str,
    arguments: tuple[*Ts],
) -> Callable[[Steps], Call[None]]:
    return lambda steps: step(steps, layer, fingerprint, *arguments)


def stream_layers(context: Context, stage: str, expected: Sequence[LayerTask]) -> list[Manifest]:
    """Do the task of every layer from activations of the dense model.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    with context.stage(stage, len(expected)):
        missing = _unfinished(context, expected, range(len(expected)))
        for layer in sorted(set(range(len(expected))) - set(missing)):
            context.emit("task-found", task=expected[layer].name)
        layers = range(_first_layer(context, missing[0]), len(expected)) if missing else range(0)
        if missing:  # the plan is that of the workers' device from then on
            context.attempt(stage, lambda: context.executor.start(context.emit))
        for wave in waves(
            layers, context.executor.num_workers, context.plan.memory.layers_per_chunk
        ):
            name = f"layers {wave[0].start} to {wave[-1].stop - 1}"
            context.attempt(name, partial(_run_wave, context, stage, wave, expected))
    return [_finished(context, task) for task in expected]


def _finished(context: Context, task: LayerTask) -> Manifest:
    done = context.folder.finished(task.name, task.fingerprint)
    assert done is not None, f"{task.name} left no manifest"
    return done


def _unfinished(context: Context, expected: Sequence[LayerTask], layers: range) -> list[int]:
    return [
        layer
        for layer in layers
        if context.folder.finished(expected[layer].name, expected[layer].fingerprint) is None
    ]


def _num_batches(context: Context) -> int:
    calibration = context.job.calibration
    return num_micro_batches(
        calibration.samples,
        calibration.shards,
        context.job.parallel.micro_batch,
        calibration.shards,
    )


def _first_layer(context: Context, missing: int) -> int:
    """The last layer, at most `missing`, before which all hidden states are at hand."""
    numbers = range(_num_batches(context))
    boundaries = (
        layer
        for layer in range(missing, 0, -1)
        if all(boundary_file(context.folder.path, layer, n).exists() for n in numbers)
    )
    return next(boundaries, 0)


def _run_wave(context: Context, stage: str, wave: Wave, expected: Sequence[LayerTask]) -> None:
    """Statistics of the wave's unfinished layers, then their tasks."""
    start = time.monotonic()
    missing = _unfinished(context, expected, range(wave[0].start, wave[-1].stop))
    wanted = {layer: expected[layer].groups for layer in missing}
    _flow(context, wave, wanted)
    places = [
        (place, layer, expected[layer])
        for place, chunk in enumerate(wave)
        for layer in chunk
        if layer in wanted
    ]
    settled = [(layer, task.start(context.executor.on(place))) for place, layer, task in places]
    # in the order in which they end
    for layer, call in sorted(settled, key=lambda item: item[0] - wave[item[1].worker].start):
        (receipt,) = context.executor.wait([call])
        seconds, memory = time.monotonic() - start, context.peak_memory_bytes()
        context.emit(
            "step-finished",
            stage=stage,
            layer=layer,
            seconds=seconds,
            groups=receipt["groups"],
            peak_memory_bytes=memory,
        )


def _flow(context: Context, wave: Wave, wanted: dict[int, Sequence[str]]) -> None:
    """Send all micro-batches through the wave: at each step every chunk works on the one its
    predecessor has just left.
    """
    executor, count = context.executor, _num_batches(context)
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
                calls.append(
                    executor.on(place).flow((chunk.start, chunk.stop), number, wanted, last, before)
                )
                handed[place] = calls[-1].payload
        under_way.append(calls)


def _report(context: Context, number: int, count: int) -> None:
    """An event at every tenth of the way: this micro-batch has left the wave."""
    if number >= 0 and (number + 1) * 10 // count > number * 10 // count:
        context.emit("micro-batches", done=number + 1, of=count)
