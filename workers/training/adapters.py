"""Low-rank adapters by peft: W + (alpha / rank) B A, of which B and A are trained.

A (rank, in) begins at random, B (out, rank) at zero: an adapter changes nothing at first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.specs.errors import ModelError, ResourceError
from rayprune.specs.training import LoraSpec
from rayprune.workers.network.maps import linear_maps

_NAME = "default"


def add_adapters(
    network: nn.Module, layers: nn.Module, options: LoraSpec, seed: int
) -> set[nn.Parameter]:
    """Freeze a network and put adapters on all linear maps of its layers; their parameters.

    Raises:
        ResourceError: peft is not installed.
        ModelError: there is nothing to put them on.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ResourceError(
            f"recover.lora needs peft ({error}); install rayprune with its extra 'train'"
        ) from None
    maps, transposed = linear_maps(network, layers)
    if not maps:
        raise ModelError("recover.lora: the layers of this model have no linear maps; leave it out")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=maps, fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, network, _NAME)
    return {parameter for parameter in network.parameters() if parameter.requires_grad}


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The maps that have adapters, by the names of their weights; none has if peft was not asked
    for.
    """
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def with_adapters(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Tensors as they are on disk, named as in the network; its adapters merged into theirs."""
    adapters = adapted(network)
    return {
        name: merged(tensor, adapters[name]) if name in adapters else tensor
        for name, tensor in tensors.items()
    }


def merged(weight: Tensor, adapter: Any) -> Tensor:
    """W + (alpha / rank) B A, of a weight as it is on disk; fp32."""
    change: Tensor = adapter.get_delta_weight(_NAME).detach()
    return weight.to(change.device, change.dtype) + change
