"""Measures how long a model's layers take, by size, on this machine: random weights of the right
shapes in the stock model, with its cache.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm
from pathlib import Path

import torch
from scipy.optimize import isotonic_regression

from rayprune.specs.errors import SpecError
from rayprune.specs.latency import LatencyTable, Phase, TimedPass
from rayprune.workers.machine.device import device_of
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.description import Group
from rayprune.workers.network.caches import with_cache
from rayprune.workers.network.stacks import Stacks
from rayprune.workers.texts.limits import check_positions
from rayprune.workers.tools.timing import medians, versions, where

ROUNDS = 9
"""Every size is timed so often, all sizes in turn; the median counts."""
WHOLE = 3
"""So many times of each round whole layers are timed: all that is saved is counted from them."""
SIZES = 12
"""Sizes per group that are timed, beside all units and none."""
FLUSHED_BYTES = 512 * 2**20
"""Weights of as many layers are more than the caches of a processor hold: a step of decoding reads
each of them from memory, as it does in a whole model."""
FEW_TOKENS = 64
"""Tokens of a pass below which reading the weights takes the time. A pass over more computes, and
two layers show what each takes."""


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    phases: Sequence[Phase] = ("prefill", "decode")
    batches: Sequence[int] = (1,)
    tokens: Sequence[int] = (512,)
    threads: int | None = None
    device: str = "auto"
    dtype: str | None = None
    """None: bfloat16 on a GPU, float32 on a CPU."""


Watch = Callable[[Sequence[int], str], Iterable[int]]
"""Gives the rounds of what is named one by one, and tells somebody of it."""


def unwatched(rounds: Sequence[int], name: str) -> Iterable[int]:
    """Tell nobody."""
    return rounds


@torch.inference_mode()
def measure_latency(model: Path, wanted: Wanted, watch: Watch = unwatched) -> LatencyTable:
    """Time layers with each of several sizes of each group, and what is outside the layers, in
    every phase with every batch and number of tokens.

    Raises:
        ModelError: no such model, or not one that can be pruned.
        SpecError: a number is too small, or the model is an encoder.
        ResourceError: there is no such device.
    """
    numbers = (*wanted.batches, *wanted.tokens, wanted.threads or 1)
    if min(numbers) < 1 or wanted.threads == 0:
        raise SpecError("--batch, --tokens and --threads must be at least 1")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    checkpoint = open_checkpoint(model)
    if not checkpoint.model.causal:
        raise SpecError(
            f"{model}: layers of an encoder cannot be timed by size yet; set budget.sparsity or"
            " budget.flops_per_token instead"
        )
    # every pass that writes leaves a token in the cache that it shares with its repetitions
    written = WHOLE * (ROUNDS + 1) if "decode" in wanted.phases else 0
    check_positions(checkpoint, max(wanted.tokens), "--tokens", written)
    device = device_of(wanted.device)
    dtype = wanted.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    stacks = Stacks(checkpoint, getattr(torch, dtype), device)
    passes = product(wanted.phases, wanted.batches, wanted.tokens)
    return LatencyTable(
        machine=where(device, torch.get_num_threads()),
        device=device.type,
        dtype=dtype,
        versions=versions(),
        passes=tuple(_measured(checkpoint, stacks, device, watch, *one) for one in passes),
    )


def _measured(
    checkpoint: Checkpoint,
    stacks: Stacks,
    device: torch.device,
    watch: Watch,
    phase: Phase,
    batch: int,
    tokens: int,
) -> TimedPass:
    """The times of one pass."""
    full = checkpoint.model.units
    given = tokens if phase == "prefill" else 1
    count = _stacked(checkpoint, stacks.element_bytes, batch * given)
    # tokens that differ, so that a router sends them to different experts
    ids_BT = torch.arange(batch * given, device=device).view(batch, given)
    ids_BT %= checkpoint.model.vocabulary

    def passing(kept: dict[str, int], count: int) -> Callable[[], object]:
        layers = stacks.layers(kept, count, batch, given)
        cache = stacks.cache(layers, batch, tokens) if phase == "decode" else None

        def work() -> object:
            network = stacks.network(layers)
            more = with_cache(network, cache)
            return network(ids_BT, use_cache=True, logits_to_keep=1, **more)

        return work

    # the whole layers first: no others take more memory
    whole_layers = passing(full, count)
    work = dict.fromkeys([("whole", number) for number in range(WHOLE)], whole_layers)
    work["outer", 0] = passing(full, 0)
    for name, units in _sizes(checkpoint.model.groups):
        work[name, units] = passing(full | {name: units}, count)
    taken = medians(work, watch(range(ROUNDS + 1), f"{phase}, {batch} x {tokens}"), device)
    outer = taken["outer", 0]
    each = {key: max(0.0, taken[key] - outer) / count for key in work}
    whole = statistics.median(each["whole", number] for number in range(WHOLE))
    return TimedPass(
        phase=phase,
        batch=batch,
        tokens=tokens,
        outer_ms=outer,
        layer_ms=whole,
        narrowed_ms={
            name: rising({n: ms for (g, n), ms in each.items() if g == name}, units, whole)
            for name, units in full.items()
        },
    )


def _stacked(checkpoint: Checkpoint, element_bytes: int, tokens: int) -> int:
    """Layers that a pass over so many tokens is timed with."""
    layer_bytes = element_bytes * checkpoint.decoder_parameters // checkpoint.num_layers
    wanted = -(-FLUSHED_BYTES // layer_bytes) if tokens < FEW_TOKENS else 2
    return min(checkpoint.num_layers, max(2, wanted))


def _sizes(groups: Sequence[Group]) -> Iterator[tuple[str, int]]:
    """Numbers of units to time, by group, ascending from none; channels in multiples of 64 where
    there are enough.

    Of units that the stock class holds all or none of, none. Some experts, and some of their
    channels, always stay.
    """
    for group in groups:
        unit = 64 if group.num_units >= 64 * SIZES else 1
        unit = lcm(unit, group.multiple, group.parts)
        step = max(1, group.num_units // SIZES // unit) * unit
        of_experts = group.kind == "experts" or group.count > 1
        least = -(-group.fewest // step) * step if of_experts else 0
        most = 1 if group.fixed or group.stock else group.num_units
        yield from ((group.name, units) for units in range(least, most, step))


def rising(measured: dict[int, float], units: int, whole: float) -> dict[int, float]:
    """Times by rising number of units: the nearest that never fall (least squares), none above
    that of the whole layer. What noise makes of equal times is so shared among them.
    """
    counts = sorted(measured)
    weights = [1.0] * len(counts) + [1e9]  # the whole layer's stays
    fit = isotonic_regression([*(measured[n] for n in counts), whole], weights=weights).x
    return {n: min(float(ms), whole) for n, ms in zip(counts, fit, strict=False)} | {units: whole}
