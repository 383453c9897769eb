"""Measures how long a model's layers take, by size, on this machine: random weights of the right
shapes, the real code.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rayprune.specs.errors import SpecError
from rayprune.specs.latency import LatencyTable
from rayprune.workers.machine.device import device_of
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.description import Group
from rayprune.workers.network import layers
from rayprune.workers.network.streamed import MicroBatch, StreamedModel
from rayprune.workers.tools.profile import finished, machine_name

ROUNDS = 9
"""Every size is timed so often, all sizes in turn; the median counts."""
SIZES = 12
"""Sizes per group that are timed, beside all units and none."""


@torch.inference_mode()
def measure_latency(
    model: Path, batch: int, tokens: int, threads: int | None = None
) -> LatencyTable:
    """Time one layer with each of several sizes of each group, and what is outside the layers; bf16
    on a GPU, fp32 on a CPU.

    Raises:
        ModelError: no such model, or not one that can be pruned.
        SpecError: a number is too small, or the model is a mixture of experts.
    """
    if min(batch, tokens, 1 if threads is None else threads) < 1:
        raise SpecError("--batch, --tokens and --threads must be at least 1")
    if threads:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    if checkpoint.model.experts:
        raise SpecError(f"{model}: latency is not measured of mixtures of experts")
    if not checkpoint.model.causal:
        raise SpecError(
            f"{model}: layers of an encoder cannot be timed by size yet; set budget.sparsity or"
            " budget.flops_per_token instead"
        )
    device = device_of("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    groups = {group.name: group for group in checkpoint.model.groups}
    streamed = StreamedModel(checkpoint, dtype, device)
    tokens_BT = torch.zeros(batch, tokens, dtype=torch.int64)
    embedded = streamed.embed(tokens_BT)
    full = {name: group.num_units for name, group in groups.items()}
    work: dict[tuple[str, int], Callable[[], object]] = {
        ("", 0): lambda: streamed.logits(tokens_BT, embedded.hidden_BTD)
    }
    for name, count in [
        ("whole", 0),
        *((name, count) for name, group in groups.items() for count in _sizes(group)),
    ]:
        kept = full | ({name: count} if count else {})
        layer = streamed.random_layer(kept)
        absent = (
            {groups[name].block.module: torch.zeros_like(embedded.hidden_BTD)}
            if name in groups and count == 0
            else {}
        )
        work[name, count] = _pass(layer, embedded, groups, absent)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in work}
    for _ in range(ROUNDS):
        for key, call in work.items():
            finished(call, device)  # brings weights into the caches that another call has filled
            times[key].append(_milliseconds(call, device))
    medians = {key: statistics.median(found) for key, found in times.items()}
    whole = medians["whole", 0]
    return LatencyTable(
        machine=machine_name(device),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        tokens=tokens,
        outer_ms=medians["", 0],
        layer_ms=whole,
        narrowed_ms={
            name: _rising(
                {count: medians[name, count] for count in _sizes(groups[name])}, full[name], whole
            )
            for name in groups
        },
    )


def _sizes(group: Group) -> list[int]:
    """Numbers of units to time, ascending from none; channels in multiples of 64 where there are
    enough.
    """
    unit = 64 if group.num_units >= 64 * SIZES else 1
    step = max(1, group.num_units // SIZES // unit) * unit
    return list(range(0, group.num_units, step))


def _rising(measured: dict[int, float], units: int, whole: float) -> dict[int, float]:
    """Times by rising number of units, none above that of the whole layer or of more units: what
    noise makes of equal times.
    """
    result, least = {units: whole}, whole
    for count in sorted(measured, reverse=True):
        result[count] = least = min(least, measured[count])
    return dict(sorted(result.items()))


def _pass(
    layer: nn.Module, embedded: MicroBatch, groups: dict[str, Group], absent: dict[str, Tensor]
) -> Callable[[], object]:
    return lambda: layers.finish_layer(
        layer, 0, MicroBatch(embedded.hidden_BTD, embedded.arguments, outputs=dict(absent)), groups
    )


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    finished(work, device)
    return 1e3 * (time.perf_counter() - start)
