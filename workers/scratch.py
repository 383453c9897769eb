"""Room for large tensors: memory, or files that are mapped, whose pages the kernel may write out and take back."""

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Scratch:
    """Allocates tensors on a device, or, given a folder, in already unlinked files there."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary content."""
        if self.folder is None or math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".spill") as file:
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        return self.empty(*shape, dtype=dtype).zero_()

    def store(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or its copy in a file."""
        return tensor if self.folder is None else self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
