"""A whole model goes on with texts, always by the likeliest token.

Of the folder's own settings (penalties, beams, samples) only the tokens that end a text count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig


@torch.inference_mode()
def greedy(network: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Go on with each prompt by at most so many tokens, by `generate`, with its cache; a model that
    ends its text writes fewer.
    """
    ends = network.generation_config.eos_token_id
    network.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    found = []
    for prompt in prompts:
        prompt_1T = torch.tensor([list(prompt)], device=network.device)
        whole_1T = network.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=count,
            do_sample=False,
        )
        found.append(whole_1T[0, len(prompt) :].tolist())
    return found
