"""Text that a model writes itself: calibration on it beside text of one domain keeps what the model
can do in others.

After Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning" (arXiv
2410.17170).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.texts import TextSpec
from rayprune.workers.calibration import load_tokenizer, tokenize
from rayprune.workers.machine.device import device_of
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.texts.checks import check_known
from rayprune.workers.texts.limits import embedding_rows

PROMPT = 32
"""Tokens of a prompt."""


def generate(
    model: Path,
    tokens: int,
    length: int = 512,
    batch: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    prompts: Path | None = None,
) -> Iterator[str]:
    """Sample documents of `length` tokens, `batch` at a time, until they hold `tokens` tokens;
    without their prompts.

    Prompts are `PROMPT` tokens of a text, one in every 8 `PROMPT` tokens; without a text a document
    begins with nothing but the first token. The whole model is loaded, over all GPUs of the machine
    if there are any.

    Raises:
        ModelError: no such model, or one that cannot be loaded.
        SpecError: the prompts' text cannot be read or is empty, or a number is too small.
    """
    if min(tokens, length, batch) < 1 or temperature <= 0:
        raise SpecError("--tokens, --length and --batch must be at least 1, --temperature above 0")
    checkpoint = open_checkpoint(model)
    if not checkpoint.model.causal:
        raise SpecError(f"{model}: an encoder writes no text; calibrate on text of its task")
    tokenizer, device_map = (
        load_tokenizer(model),
        ("auto" if device_of("auto").type == "cuda" else "cpu"),
    )
    prompts_NP = _prompts(tokenizer, prompts, math.ceil(tokens / length))
    check_known(prompts_NP, embedding_rows(checkpoint), str(prompts or model))
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map=device_map, trust_remote_code=False, local_files_only=True
    )
    torch.manual_seed(seed)
    first = written = 0
    while written < tokens:
        prompts_BP = prompts_NP[[(first + number) % len(prompts_NP) for number in range(batch)]].to(
            network.device
        )
        first += batch
        for found_T in _sampled(network, prompts_BP, length, temperature):
            text = str(tokenizer.decode(found_T, skip_special_tokens=True))
            written += len(tokenizer(text)["input_ids"])
            yield text
            if written >= tokens:
                return


def _sampled(network: Any, prompts_BP: Tensor, length: int, temperature: float) -> Tensor:
    """What the model goes on with, (B, length); every token may follow, but for an end."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    exact = {"max_new_tokens": length, "min_new_tokens": length}
    found: Tensor = network.generate(
        prompts_BP, attention_mask=torch.ones_like(prompts_BP), pad_token_id=0, **sampling, **exact
    )
    return found[:, prompts_BP.shape[1] :]


def _prompts(tokenizer: PreTrainedTokenizerBase, text: Path | None, count: int) -> Tensor:
    """Prompts (N, P), int64."""
    if text is None:
        first = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        if first is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer has no first token; give --prompts"
            )
        return torch.tensor([[first]])
    ids_T = tokenize(TextSpec(path=str(text)), tokenizer, count * 8 * PROMPT)
    if len(ids_T) == 0:
        raise SpecError(f"{text}: holds no text; leave --prompts out, or give another file")
    starts = [number * max(0, len(ids_T) - PROMPT) // count for number in range(count)]
    return torch.stack([ids_T[start : start + PROMPT] for start in starts])
