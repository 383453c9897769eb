"""The state of a training in which its loss on windows that it never sees was least."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rayprune.workers.store.training_stage import HeldOut
from rayprune.workers.training.states import Files, fill, saved

_MEASURED = "held_out"


class Best:
    """What was measured so far, and the weights at the best of it: the first of equals."""

    def __init__(self, options: HeldOut, trained: Mapping[str, nn.Parameter]) -> None:
        """`trained` are the weights that change, by name."""
        self.options, self._trained = options, trained
        self.measured: list[float] = []
        """Before the training, after every so many steps, and behind its last."""
        self._weights = {name: tensor.data.clone() for name, tensor in trained.items()}

    @property
    def number(self) -> int:
        """Number of the best measurement."""
        return self.measured.index(min(self.measured))

    @property
    def ended(self) -> bool:
        """Whether enough measurements in a row were no better."""
        patience = self.options.patience
        return patience is not None and len(self.measured) - 1 - self.number >= patience

    def is_due(self, done: int, steps: int) -> bool:
        """Whether to measure behind so many steps of all."""
        return done % self.options.every == 0 or done == steps

    def note(self, value: float) -> None:
        """Take up a measurement of the weights as they are."""
        self.measured.append(value)
        if self.number == len(self.measured) - 1:
            for name, tensor in self._trained.items():
                self._weights[name].copy_(tensor.data)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the best weights."""
        for name, tensor in self._trained.items():
            tensor.copy_(self._weights[name])

    def state(self) -> dict[str, Tensor]:
        """What is saved of it, beside weights and optimizer."""
        weights = {_key(name): tensor for name, tensor in self._weights.items()}
        return {_MEASURED: torch.tensor(self.measured, dtype=torch.float64), **weights}

    def take_over(self, files: Files) -> None:
        """Go on from a saved state."""
        self.measured = saved(files, _MEASURED)[0].tolist()
        for name, tensor in self._weights.items():
            fill(tensor, saved(files, _key(name)))


def _key(name: str) -> str:
    return f"best/{name}"
