"""What goes from layer to layer: hidden states of some windows, and what layers get besides."""

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayprune.workers.network.experts import Routing

Store = Callable[[Tensor], Tensor]
LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]
HIDDEN = "hidden"
"""The hidden states' name in a state of a micro-batch."""


@dataclass
class MicroBatch:
    """A few windows on their way through the layers.

    `hidden_BTD` is the input of the current layer, `arguments[i]` what layer i gets besides, and
    `for_later` the arguments in which layers leave what later ones read. Of the current layer:
    `inputs[group]` is a consumer's input (a cache), `routing` what its experts are given (a cache),
    `outputs[block]` the output that stands in for a block. `store` puts hidden states and outputs
    where they wait: it returns them, or their copy elsewhere.
    """

    hidden_BTD: Tensor
    arguments: Mapping[int, LayerArguments]
    for_later: "Mapping[str, ForLater]" = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    routing: Routing | None = None
    store: Store = lambda tensor: tensor

    def parted(self) -> "MicroBatch":
        """Another one at the same place, which goes its own way from there."""
        left = {name: found.copy() for name, found in self.for_later.items()}
        return MicroBatch(self.hidden_BTD, self.arguments, left, store=self.store)

    def state(self) -> dict[str, Tensor]:
        """What layers need of those before: hidden states, and what was left for later."""
        left = {
            f"{argument}.{name}.{number}": tensor
            for argument, found in self.for_later.items()
            for name, tensors in found.items()
            for number, tensor in enumerate(tensors)
        }
        return {HIDDEN: self.hidden_BTD, **left}

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Stand where another one of the same windows stood."""
        self.hidden_BTD = self.store(state[HIDDEN])
        for argument, found in self.for_later.items():
            names = sorted(name for name in state if name.startswith(f"{argument}."))
            for kind in {name.split(".")[1] for name in names}:
                found[kind] = tuple(state[n] for n in names if n.split(".")[1] == kind)


class ForLater(UserDict[str, tuple[Tensor, ...]]):
    """What layers leave for later ones: it waits where hidden states do."""

    def __init__(self, store: Store, device: torch.device) -> None:
        super().__init__()
        self._store, self._device = store, device

    def __setitem__(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        super().__setitem__(name, tuple(map(self._store, tensors)))

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self._device) for tensor in super().__getitem__(name))
