"""Measures this machine for a plan: products, memory, disk. Takes some seconds; the network cannot
be measured alone.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rayprune.specs.machine import MachineProfile
from rayprune.workers.machine.device import device_of

NETWORK_BANDWIDTH = 1.25e9
"""Assumed: 10 Gbit/s, in bytes/s."""
DISK_BYTES = 256 * 2**20
SECONDS = 1.0
"""How long each rate is measured."""


def measure() -> MachineProfile:
    """Rates of one worker on this machine with as many threads as torch uses, and the memory that
    is free for it.
    """
    device = device_of("auto")
    size = 8192 if device.type == "cuda" else 1024
    torch.backends.cuda.matmul.allow_tf32 = False
    return MachineProfile(
        name=machine_name(device),
        device="cuda" if device.type == "cuda" else "cpu",
        forward_flops=_flops(
            size, torch.bfloat16 if device.type == "cuda" else torch.float32, device
        ),
        fp32_flops=_flops(size, torch.float32, device),
        fp64_flops=_flops(size // 2, torch.float64, device),
        memory_bandwidth=_memory_bandwidth(device),
        disk_bandwidth=_disk_bandwidth(),
        network_bandwidth=NETWORK_BANDWIDTH,
        memory_bytes=_free_memory(device),
    )


def machine_name(device: torch.device) -> str:
    """What a device is called in profiles and tables."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu with {torch.get_num_threads()} threads"
    )


def _repeated(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after a first one that does not count."""
    finished(work, device)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        finished(work, device)
        count += 1
    return seconds / count


def finished(work: Callable[[], object], device: torch.device) -> None:
    """Do some work and wait until the device has done it."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product."""
    matrix = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    out = torch.empty_like(matrix)
    return 2 * size**3 / _repeated(lambda: torch.mm(matrix, matrix, out=out), device)


def _memory_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.ones(256 * 2**20 if device.type == "cuda" else 16 * 2**20, device=device)
    target: Tensor = torch.empty_like(source)
    return 2 * source.nbytes / _repeated(lambda: target.copy_(source), device)


def _disk_bandwidth() -> float:
    """Bytes/s of writing and syncing a file in the folder for temporary files."""
    block = os.urandom(2**20)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "block").open("wb") as stream:
        start = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        return DISK_BYTES / (time.perf_counter() - start)


def _free_memory(device: torch.device) -> int:
    """Bytes a worker could take now: of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
