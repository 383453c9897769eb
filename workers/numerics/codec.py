"""Tensors as numpy arrays and back, without a copy and without loss."""

import warnings

import numpy as np
import torch
from torch import Tensor

_READ_ONLY = "The given NumPy array is not writable"


def to_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array, if it lies in host memory; numpy has no bfloat16, so its
    bits travel as int16.
    """
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_array(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor `to_array` was given, in the array's memory. The array may be read-only, so the
    tensor must not be written to.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_READ_ONLY)
        tensor = torch.from_numpy(array)
    return tensor.view(dtype)
