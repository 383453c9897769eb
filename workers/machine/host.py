"""What this machine has: cores, memory, GPUs. No torch at import."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rayprune.specs.machine import MachineProfile

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands."""


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
    return Host(len(os.sched_getaffinity(0)), _memory_bytes(), gpus)


def _memory_bytes() -> int:
    found = [int(psutil.virtual_memory().total)]
    for name in _LIMITS:
        # no such file, or `max` in it: no limit
        with suppress(OSError, ValueError):
            found.append(int(Path(name).read_text()))
    return min(found)
