"""What this machine has: cores, memory, GPUs, fast types. No torch at import."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rayprune.specs.machine import MachineProfile

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands."""
SIZE = 256
"""Of the matrices whose products are timed."""
SLOW_PACE = 2.0
"""From this `bfloat16_pace` on, float32 is taken, or advised, in place of bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Host:
    """One machine, as far as jobs go by it."""

    cores: int
    """That this process may use."""
    memory_bytes: int
    """Of the machine, or of the container where that has less."""
    gpus: tuple[Gpu, ...] = ()
    profile: MachineProfile | None = None
    """What is known of one worker, where it is not this machine."""
    bfloat16_pace: float = 1.0
    """`bfloat16_pace` of its cores, where workers compute on them."""


def workers_like(profile: MachineProfile, count: int) -> Host:
    """A machine, or several, with room for so many workers of a profile."""
    gpu = Gpu(profile.name, profile.memory_bytes)
    gpus = (gpu,) * count if profile.device == "cuda" else ()
    return Host(count, count * profile.memory_bytes, gpus, profile)


def this_host() -> Host:
    """Look at the machine that this process runs on."""
    import torch

    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(each.name, each.total_memory) for each in found)
    pace = 1.0 if gpus else bfloat16_pace()
    return Host(len(os.sched_getaffinity(0)), _memory_bytes(), gpus, bfloat16_pace=pace)


def bfloat16_pace() -> float:
    """How many times as long as in float32 a product takes in bfloat16 on this machine's cores,
    measured in a tenth of a second: 0.5 where they have instructions for it, 10 to 50 where they
    have not and torch multiplies number by number.
    """
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows = torch.ones(SIZE, SIZE, dtype=dtype)
        taken = []
        for _ in range(3):  # the first one is a first use
            start = time.perf_counter()
            torch.nn.functional.linear(rows, rows)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def _memory_bytes() -> int:
    found = [int(psutil.virtual_memory().total)]
    for name in _LIMITS:
        # no such file, or `max` in it: no limit
        with suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    return min(found)
