"""Memory for large matrices: plain, or mapped onto a file that the kernel may write out when memory
is short.
"""

import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rayprune.specs.errors import ResourceError

MAPPED_FROM_BYTES = 2**20
"""Smaller tensors are plain in any case."""


@dataclass(frozen=True)
class Scratch:
    """Where statistics and factors are allocated: on `device`, or, given a folder, in host memory
    backed by files there.

    A file is unlinked as soon as it is mapped: its space goes with the tensor, whatever ends the
    process. Its pages are no private memory. Numbers are the same either way.
    """

    device: torch.device
    folder: Path | None

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        return (
            self._mapped(shape, dtype)
            if self._is_mapped(shape, dtype)
            else torch.zeros(shape, dtype=dtype, device=self._place)
        )

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of anything."""
        return (
            self._mapped(shape, dtype)
            if self._is_mapped(shape, dtype)
            else torch.empty(shape, dtype=dtype, device=self._place)
        )

    def store(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or its copy in a file."""
        return (
            tensor
            if self.folder is None
            else self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
        )

    @property
    def _place(self) -> torch.device:
        return self.device if self.folder is None else torch.device("cpu")

    def _is_mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return self.folder is not None and prod(shape) * dtype.itemsize >= MAPPED_FROM_BYTES

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in a file. Its space is taken at once: a full disk met later, at a page fault,
        would kill the process.
        """
        num_bytes = prod(shape) * dtype.itemsize
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="scratch-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                raise ResourceError(
                    f"{self.folder}: no {num_bytes / 2**30:.2f} GiB for scratch ({error}); free"
                    " some space there"
                ) from None
            return torch.from_file(file.name, shared=True, size=prod(shape), dtype=dtype).view(
                shape
            )
