"""transformers, on the CPU in float32: the measure of all others."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rayprune.workers.engines.engine import Tokens
from rayprune.workers.network.greedy import greedy as go_on
from rayprune.workers.network.load_check import loaded


def greedy(model: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on by `generate`, with its cache."""
    return go_on(loaded(model, torch.float32), prompts, count)
