"""How long work takes on a device: by events on a GPU, by the clock on a CPU."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import TypeVar

import torch

from rayprune.workers.machine.device import processor

K = TypeVar("K")
COMPUTES = ("torch", "transformers")
"""Packages whose versions decide about speed."""


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Do some work, wait until the device has done it, and tell how long that took."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def medians(
    work: Mapping[K, Callable[[], object]], rounds: Iterable[int], device: torch.device
) -> dict[K, float]:
    """Milliseconds of each piece of work, the median over rounds in which all take turns, each
    round in another order, so that nothing that comes and goes meets the same ones; round 0 warms
    up.
    """
    times: dict[K, list[float]] = {key: [] for key in work}
    for number in rounds:
        for key in random.Random(number).sample(list(work), len(work)):
            taken = milliseconds(work[key], device)
            times[key] += [taken] if number else []
    return {key: statistics.median(found) for key, found in times.items()}


def chosen_threads(wanted: int | None) -> int:
    """So many CPU threads; None: as many as torch takes."""
    return torch.get_num_threads() if wanted is None else wanted


def where(device: torch.device, threads: int) -> str:
    """The machine as a table names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Of the packages that compute."""
    return {name: version(name) for name in COMPUTES}
