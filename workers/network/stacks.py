"""The stock model with layers of any sizes and weights that mean nothing: for timing. No weight is
read.

Letters: B sequences, G KV groups, T tokens, H head size.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.network.building import config_of_layers, empty_layers, empty_model, layers_of
from rayprune.workers.network.caches import cache_of
from rayprune.workers.network.experts import changed_config
from rayprune.workers.network.layers import Constant

ALIGNED = 64
"""Every weight begins at a multiple of so many numbers."""
SPREAD = 0.02
"""Standard deviation of the weights: far from what overflows, and from what is too small for the
fast ways of a processor."""


class Stacks:
    """A model whose layers are put in its place, some at a time.

    All layers take their weights from the same stretch of memory, so that stacks of many sizes
    need no more of it than the largest, which is made first.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._described, self._sizes = checkpoint.model, checkpoint.layer_sizes
        self._dtype, self._device = dtype, device
        self._network = empty_model(checkpoint, dtype).eval().requires_grad_(False)
        self._config = config_of_layers(self._network, self._described)
        self._layer = type(layers_of(self._network, self._described)[0])
        self._numbers = torch.empty(0, dtype=dtype, device=device)
        outer = self.network([])
        _fill(outer, self._random(_room([outer])))
        outer.tie_weights()
        outer.to(device)

    @property
    def element_bytes(self) -> int:
        """Of a weight."""
        return self._dtype.itemsize

    def network(self, layers: Sequence[nn.Module]) -> Any:
        """The model with these layers in the place of its own; the ones before are gone."""
        self._network.set_submodule(self._described.layers_at, nn.ModuleList(layers))
        return self._network.get_submodule(self._described.predictor)

    def layers(
        self, kept: Mapping[str, int], count: int, batch: int, tokens: int
    ) -> list[nn.Module]:
        """So many layers that keep these units; where a group keeps none, zeros for `batch` x
        `tokens` stand for its block.
        """
        units = self._described.units
        whole = {name: number or units[name] for name, number in kept.items()}
        sizes = changed_config(self._config, self._sizes(whole))
        made = empty_layers(self._layer, sizes, count)
        if (room := _room(made)) > len(self._numbers):
            self._numbers = self._random(room)
        place = 0
        for layer in made:
            place = _fill(layer, self._numbers, place)
            for group in self._described.groups:
                if kept[group.name] == 0:
                    zeros_BTD = self._zeros(batch, tokens, self._described.hidden)
                    layer.set_submodule(group.block.module, Constant(zeros_BTD, group.block))
        return [layer.to(self._device) for layer in made]

    def cache(self, layers: Sequence[nn.Module], batch: int, tokens: int) -> Any:
        """Keys and values of so many tokens, in slots as these layers make them of a first one."""
        first_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        cache = cache_of(self.network(layers)(first_B1, use_cache=True))
        for index, slot in enumerate(cache.layers):
            if slot.is_initialized and tokens > 1:
                more = (
                    known_BGTH.new_zeros(*known_BGTH.shape[:2], tokens - 1, *known_BGTH.shape[3:])
                    for known_BGTH in (slot.keys, slot.values)
                )
                cache.update(*more, index)
        return cache

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _random(self, count: int) -> Tensor:
        return torch.empty(count, dtype=self._dtype, device=self._device).normal_(std=SPREAD)


def _room(modules: Sequence[nn.Module]) -> int:
    """Numbers that the weights of some modules take."""
    return sum(_aligned(tensor) for module in modules for tensor in module.parameters())


def _aligned(tensor: Tensor) -> int:
    return -(-prod(tensor.shape) // ALIGNED) * ALIGNED


def _fill(module: nn.Module, numbers: Tensor, place: int = 0) -> int:
    """Give a module its weights from `place` on; where they end."""
    for name, empty in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = numbers[place : place + prod(empty.shape)].view(empty.shape)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
        place += _aligned(empty)
    return place
