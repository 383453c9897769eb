"""Tensors as numpy arrays without a copy, as they travel between workers. numpy has no bfloat16: it travels as int16."""

import warnings

import numpy as np
import torch
from torch import Tensor


def to_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory (copied only from a GPU, or where it is not contiguous)."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_array(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What `to_array` was given, in the array's own memory, which may belong to other readers too: it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only array is what is expected
        tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
