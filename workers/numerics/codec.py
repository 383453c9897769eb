"""Tensors as numpy arrays and back, without a copy and without loss; and in their types on disk."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import DTYPES

_TYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for name, code in DTYPES.items()}
_READ_ONLY = "The given NumPy array is not writable"


def to_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array, if it lies in host memory; numpy has no bfloat16, so its bits travel as int16."""
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_array(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor `to_array` was given, in the array's memory. The array may be read-only, so the tensor must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_READ_ONLY)
        tensor = torch.from_numpy(array)
    return tensor.view(dtype)


def on_disk(tensor: Tensor, code: str) -> Tensor:
    """The tensor on the CPU, in the type that headers of safetensors files call `code`."""
    return tensor.to("cpu", _TYPES[code]).contiguous()


def trained(tensors: Mapping[str, Tensor], codes: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of a training, by name, as they are written in the types of these codes.

    Raises:
        ModelError: one is not finite.
    """
    written = {name: on_disk(tensor, codes[name]) for name, tensor in tensors.items()}
    if wrong := [name for name, tensor in written.items() if not tensor.isfinite().all()]:
        raise ModelError(f"{wrong[0]} is not finite after the training; lower learning_rate")
    return written
