"""Where a process computes."""

import torch

from specs.errors import ResourceError


def device_of(name: str) -> torch.device:
    """`cuda`: this process's GPU; `auto`: that if there is one, else the CPU; `cpu`.

    Raises:
        ResourceError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("parallel.device: cuda, but torch finds no GPU here; set parallel.device: auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
