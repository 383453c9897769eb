"""A stock network without weights, and with them."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.description import Model, RemoteCode
from rayprune.workers.model.folder import TensorInfo
from rayprune.workers.network.experts import with_own_experts
from rayprune.workers.network.reading import CPU, read_tensors
from rayprune.workers.stock import refused_by, stock_config


def layers_of(network: nn.Module, model: Model) -> nn.ModuleList:
    """The layers of a whole network."""
    found = network.get_submodule(model.layers_at)
    assert isinstance(found, nn.ModuleList)
    return found


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model without its weights: the stock class, or this package's own where layers differ in
    size; never code of the folder. It drops nothing at random, also where it is trained: no number
    of a run depends on chance that is not kept. Its FFNs are called once, with all tokens.
    """
    sizes, file = stock_config(checkpoint.path), checkpoint.path / "config.json"
    _drop_nothing(sizes)
    sizes.chunk_size_feed_forward = 0
    refused = refused_by("transformers", file, "correct the value")
    # buffers hold their values from the start; what parameters would start from is never read
    with refused, init_empty_weights(include_buffers=False), no_init_weights():
        if (code := checkpoint.model.code) is None:
            stock = getattr(transformers, checkpoint.model.auto_class)
            network = (
                stock._from_config(sizes, dtype=dtype)
                if checkpoint.model.beside
                else stock.from_config(sizes, dtype=dtype, trust_remote_code=False)
            )
        else:
            network = built_from(code)._from_config(sizes, dtype=dtype)
    for module in checkpoint.model.beside:
        network.set_submodule(module, nn.Module())
    described = checkpoint.model.layers
    for layer, its in zip(layers_of(network, checkpoint.model), described, strict=True):
        with_own_experts(layer, its.members.get("experts"))
    for module in network.modules():
        # as `from_pretrained` does: tables of positions are computed in float32
        if module._buffers and not module._parameters:
            network._init_weights(module)
    return network


def _drop_nothing(sizes: Any) -> None:
    """Set every rate of dropout in a config, and in those inside it, to 0."""
    for name, value in vars(sizes).items():
        if isinstance(value, PreTrainedConfig):
            _drop_nothing(value)
        elif "drop" in name and isinstance(value, float):
            setattr(sizes, name, 0.0)


def config_of_layers(network: Any, model: Model) -> Any:
    """The stock config that the class of a layer is given: of a text model inside a larger one its
    own.
    """
    return network.get_submodule(model.backbone).config


def empty_layers(kind: type[nn.Module], sizes: Any, count: int) -> list[nn.Module]:
    """The first layers that a stock class builds from a config, without weights."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        return [kind(sizes, index).eval() for index in range(count)]


def built_from(code: RemoteCode) -> Any:
    """The class of a model whose layers differ in size, from this package's own text."""
    # of every size that is read from the config as a whole: the class never relies on one
    noisy = "transformers.integrations.heterogeneity.configuration_utils"
    logging.getLogger(noisy).setLevel(logging.ERROR)
    module: dict[str, Any] = {}
    exec(code.text, module)
    return module[code.name]


def fill(
    network: Any,
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    device: torch.device = CPU,
) -> None:
    """Give a network these tensors, mapped from their files or copied to a GPU; afterwards it is
    whole.

    Raises:
        ModelError: a tensor is missing, superfluous, of another shape or not finite.
    """
    model = checkpoint.model
    if model.beside:
        infos = {name: i for name, i in infos.items() if not name.startswith(model.beside)}
    names = model.module_names
    found = read_tensors(checkpoint, infos, device=device)
    tensors = {names.get(name, name): tensor for name, tensor in found.items()}
    try:
        unknown = network.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # shapes that the config does not imply
        raise ModelError(f"{checkpoint.path}: {' '.join(str(error).split())}") from None
    if unknown and not checkpoint.model.open_outside:
        raise ModelError(
            f"{checkpoint.path}: holds {unknown[0]}, which {type(network).__name__} does not know"
        )
    network.tie_weights()
    for name in [name for name, tensor in network.named_parameters() if tensor.is_meta]:
        if not name.startswith(checkpoint.model.made_up or ("\0",)):
            raise ModelError(f"{checkpoint.path}: lacks {name}")
        owner, _, leaf = name.rpartition(".")
        zeros = torch.zeros(network.get_parameter(name).shape, device=device)
        setattr(network.get_submodule(owner), leaf, nn.Parameter(zeros))


def whole_model(checkpoint: Checkpoint) -> Any:
    """The model with all its weights, in their types on disk; on the CPU they are mapped from the
    files.

    Raises:
        ModelError: a tensor is missing, superfluous or not finite.
    """
    network = empty_model(checkpoint, torch.float32)
    fill(network, checkpoint, checkpoint.tensors)
    return network
