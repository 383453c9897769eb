"""The linear maps of a network's layers."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_maps(network: nn.Module, layers: nn.Module) -> tuple[list[str], bool]:
    """The names of all linear maps in some layers, and whether their matrices are (in, out), as
    GPT-2's.
    """
    inside = set(layers.modules())
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in inside
    }
    return list(found), bool(found) and all(isinstance(m, Conv1D) for m in found.values())
