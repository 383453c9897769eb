"""Where a process computes, and the memory it takes there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from platform import machine

import psutil
import torch

from rayprune.specs.errors import ResourceError
from rayprune.workers.machine.host import SLOW_PACE, bfloat16_pace
from rayprune.workers.machine.memory import PeakMemory


def device_of(name: str) -> torch.device:
    """`cuda`: this process's GPU; `auto`: that if there is one, else the CPU; `cpu`.

    Raises:
        ResourceError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "parallel.device: cuda, but torch finds no GPU here; set parallel.device: auto or cpu"
        )
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without, products in it take many times as
    long as in float32 (GPUs before NVIDIA's Ampere, processors without AVX-512 or AMX).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bfloat16_pace() < SLOW_PACE


def peak_memory_bytes(private: PeakMemory, device: torch.device) -> dict[str, int]:
    """Highest memory of this process so far, by kind: private memory, and (` GPU`) what torch has
    allocated on its GPU.
    """
    gpu = {" GPU": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"": private.bytes} | gpu


def processor() -> str:
    """The processor's name, as Linux gives it; elsewhere what kind it is of."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, machine())


@cache
def check_room(model: Path, needed_bytes: int, device: torch.device, option: str) -> None:
    """Check that a whole model, which an option asks for, fits into the memory that is free where
    it is computed on.

    Raises:
        ResourceError: it does not.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed_bytes > free:
        raise ResourceError(
            f"{option}: {model} takes {needed_bytes / 2**30:.2f} GiB as a whole,"
            f" {free / 2**30:.2f} are free on the {device.type}; leave it out"
        )


def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """A stream of a GPU for work beside the rest, one for each purpose."""
    del purpose
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device, purpose: str) -> Iterator[None]:
    """Work for a GPU that waits for nothing it still has to do; at the end all of it is done."""
    if device.type != "cuda":
        yield
        return
    stream = side_stream(device, purpose)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def repeated(work: Callable[[], object], times: int, device: torch.device) -> Iterator[None]:
    """Do the same work so many times, with a turn for the caller after each. On a GPU, where it
    must launch the same kernels on the same memory and never wait, it is recorded behind the first
    time and replayed with one launch.
    """
    if device.type != "cuda":
        for _ in range(times):
            work()
            yield
        return
    stream = side_stream(device, "recorded")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()  # what libraries make at first use, and keep for a stream, is in no record
        yield
        if times > 1:
            graph = torch.cuda.CUDAGraph()
            # other threads may take memory meanwhile
            graph.capture_begin(capture_error_mode="thread_local")
            work()
            graph.capture_end()
        for _ in range(times - 1):
            graph.replay()
            yield
    torch.cuda.current_stream(device).wait_stream(stream)
