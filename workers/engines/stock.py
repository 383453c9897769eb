"""transformers, on the CPU in float32: the measure of all others."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rayprune.workers.engines.engine import Tokens
from rayprune.workers.network.load_check import loaded


@torch.inference_mode()
def greedy(model: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on by `generate`, with its cache."""
    network = loaded(model, torch.float32)
    found = []
    for prompt in prompts:
        prompt_1T = torch.tensor([prompt])
        whole_1T = network.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=count,
            do_sample=False,
        )
        found.append(whole_1T[0, len(prompt) :].tolist())
    return found
