"""Modules whose weights stay in their mapped files, in their types on disk, and are converted part
by part as they are used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.workers.machine.blocks import CONVERTED_BYTES


class _MappedLinear(nn.Module):
    """A linear map whose weight stays in its mapped file, in its type on disk; some rows are
    converted at a time.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self._dtype = linear.weight, dtype
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the converted weight, block by block of output features."""
        out_features, in_features = self.weight.shape
        result = x.new_empty(*x.shape[:-1], out_features)
        step = max(1, CONVERTED_BYTES // (in_features * self._dtype.itemsize))
        for start in range(0, out_features, step):
            rows = slice(start, start + step)
            bias = self._parameters["bias"]
            result[..., rows] = nn.functional.linear(
                x, self.weight[rows].to(self._dtype), None if bias is None else bias[rows]
            )
        return result


class _MappedEmbedding(nn.Module):
    """An embedding whose table stays in its mapped file; the rows that are looked up are
    converted.
    """

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self._dtype = embedding.weight, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens' rows."""
        return nn.functional.embedding(tokens, self.weight).to(self._dtype)


_MAPPED: dict[type, Callable[[Any, torch.dtype], nn.Module]] = {
    nn.Linear: _MappedLinear,
    nn.Embedding: _MappedEmbedding,
}


def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module ready for forward passes: moved to a GPU; on the CPU large weights stay in their
    mapped files.
    """
    unmapped = {
        id(weight)
        for child in module.modules()
        if type(child) not in _MAPPED
        for weight in child.parameters(recurse=False)
    }
    mapped: set[int] = set()
    for name, child in list(module.named_modules()) if device.type == "cpu" else ():
        if (
            type(child) in _MAPPED
            and child.weight.dtype != dtype
            and id(child.weight) not in unmapped
        ):
            module.set_submodule(name, _MAPPED[type(child)](child, dtype))
            mapped.add(id(child.weight))
    for parameter in module.parameters():
        if id(parameter) not in mapped:
            parameter.data = parameter.data.to(device, dtype)
    return module.to(device)


def put_weight(module: nn.Module, leaf: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Give a module another weight of that name, for passes in a type: a mapped module converts it
    itself.
    """
    own = weight if isinstance(module, _MappedLinear) else weight.to(dtype)
    setattr(module, leaf, nn.Parameter(own, requires_grad=False))
