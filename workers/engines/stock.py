"""transformers, on the CPU in float32: the measure of all others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rayprune.workers.engines.engine import Tokens
from rayprune.workers.model.checkpoint import own_model
from rayprune.workers.network.load_check import class_for


def load(model: Path) -> Any:
    """A model's folder in float32; no code that lies in it is run.

    Raises:
        VerificationError: it holds code that this package would not have written for it.
    """
    return class_for(own_model(model)).from_pretrained(
        model,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )


@torch.inference_mode()
def greedy(model: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on by `generate`, with its cache."""
    network = load(model)
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
