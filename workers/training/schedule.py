"""Which windows a step of a training takes, and at what rate: both follow from the job alone."""

import math
from functools import lru_cache

import torch

from rayprune.specs.training import TrainingSpec


def windows_of(step: int, options: TrainingSpec, num_windows: int) -> list[int]:
    """Numbers of the windows of one step: epoch after epoch, each in an order of its own."""
    first, numbers = step * options.batch, []
    for position in range(first, first + options.batch):
        epoch, place = divmod(position, num_windows)
        numbers.append(_order(options.seed, epoch, num_windows)[place])
    return numbers


@lru_cache(maxsize=2)  # a step reaches into two epochs at most, unless they are shorter than it
def _order(seed: int, epoch: int, num_windows: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(num_windows, generator=generator).tolist()
    return order


def rate(step: int, steps: int, options: TrainingSpec) -> float:
    """The learning rate of a step, as a part of the largest."""
    warmup = math.ceil(options.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        options.schedule
    ]
