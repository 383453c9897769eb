"""Tensors in their types on disk."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import DTYPES

TYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for name, code in DTYPES.items()}
"""By what headers of safetensors files call them."""


def on_disk(tensor: Tensor, code: str) -> Tensor:
    """The tensor on the CPU, in the type that headers of safetensors files call `code`."""
    return tensor.to("cpu", TYPES[code]).contiguous()


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in the type that it is written in.

    Raises:
        ModelError: a finite number of it is too large for that type.
    """
    result = tensor.to(dtype)
    if dtype != tensor.dtype and not result.isfinite().all() and tensor.isfinite().all():
        raise ModelError(
            f"{name}: {float(tensor.abs().max()):.3g} is too large for"
            f" {str(dtype).removeprefix('torch.')}; set export.dtype: bfloat16 or float32"
        )
    return result


def trained(tensors: Mapping[str, Tensor], codes: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of a training, by name, as they are written in the types of these codes.

    Raises:
        ModelError: one is not finite.
    """
    written = {name: on_disk(tensor, codes[name]) for name, tensor in tensors.items()}
    if wrong := [name for name, tensor in written.items() if not tensor.isfinite().all()]:
        raise ModelError(f"{wrong[0]} is not finite after the training; lower learning_rate")
    return written
