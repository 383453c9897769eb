"""Where a process computes, and the memory it takes there."""

import torch

from rayprune.specs.errors import ResourceError
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


def peak_memory_bytes(private: PeakMemory, device: torch.device) -> dict[str, int]:
    """Highest memory of this process so far, by kind: private memory, and (` GPU`) what torch has
    allocated on its GPU.
    """
    gpu = {" GPU": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"": private.bytes} | gpu
