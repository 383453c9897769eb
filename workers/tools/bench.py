"""Measures models side by side in transformers: reading a prompt, writing behind it.

Every model lives in a process of its own, so that each has a peak of memory of its own, and all of
them run in turns, so that what else the machine does meets all alike. Medians count.
"""

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from rayprune.specs.errors import SpecError
from rayprune.workers.machine.device import peak_memory_bytes
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.caches import cache_of, with_cache
from rayprune.workers.network.load_check import loaded
from rayprune.workers.texts.limits import check_positions
from rayprune.workers.tools.timing import milliseconds


@dataclass(frozen=True)
class Conditions:
    """How models are measured."""

    tokens: int = 512
    """Of the prompt."""
    new: int = 32
    """Tokens that are written behind it."""
    rounds: int = 5
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    """`cpu` or `cuda`."""


@dataclass(frozen=True)
class Speed:
    """What one model takes."""

    identity: str
    """Digest of its shapes and types."""
    parameters: int
    bytes_on_disk: int
    kv_bytes_per_token: int
    """Keys and values of a token in all layers, in the type that is computed in."""
    first_token_seconds: float
    """From a prompt to the first token."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    """Private memory of its process, at most; on a GPU what torch has taken there."""
    prefill_ratio: float
    """Speed over the first model's, in the same round: the median."""
    decode_ratio: float


@dataclass(frozen=True)
class _Round:
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int


def bench(models: Sequence[Path], conditions: Conditions) -> Iterator[Speed]:
    """Measure models.

    Raises:
        ModelError: no such model, or one that is not known.
        SpecError: a number is too small, or too large for learned positions; an encoder.
    """
    c = conditions
    if min(c.tokens, c.new, c.rounds, c.threads) < 1:
        raise SpecError("--tokens, --new, --rounds and --threads must be at least 1")
    checkpoints = [open_checkpoint(model) for model in models]
    for checkpoint in checkpoints:
        if not checkpoint.model.causal:
            raise SpecError(f"{checkpoint.path}: is an encoder, which writes nothing")
        check_positions(checkpoint, c.new, "--new", c.tokens)
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for _ in models
        ]
        found: list[list[_Round]] = [[] for _ in models]
        for number in range(c.rounds + 1):  # the first one loads and warms up
            for pool, model, times in zip(pools, models, found, strict=True):
                done = pool.submit(_measure, model, c).result()
                times += [done] if number else []
    for checkpoint, times in zip(checkpoints, found, strict=True):
        prefill, decode = ([getattr(r, name) for r in times] for name in _TIMES)
        paired = [
            [getattr(b, name) / getattr(t, name) for b, t in zip(found[0], times, strict=True)]
            for name in _TIMES
        ]
        element = torch.finfo(getattr(torch, c.dtype)).bits // 8
        yield Speed(
            checkpoint.identity,
            checkpoint.parameters,
            checkpoint.bytes_on_disk,
            element * checkpoint.model.cached_numbers,
            statistics.median(prefill),
            c.tokens / statistics.median(prefill),
            c.new / statistics.median(decode),
            max(each.peak_memory_bytes for each in times),
            statistics.median(paired[0]),
            statistics.median(paired[1]),
        )


_TIMES = ("prefill_seconds", "decode_seconds")


@cache
def _loaded(model: Path, conditions: Conditions) -> Any:
    torch.set_num_threads(conditions.threads)
    return loaded(model, getattr(torch, conditions.dtype)).to(conditions.device)


@torch.inference_mode()
def _measure(model: Path, conditions: Conditions) -> _Round:
    """One round of one model, in its process."""
    device = torch.device(conditions.device)
    with PeakMemory() as memory:
        network = _loaded(model, conditions)
        rows = network.get_input_embeddings().num_embeddings
        prompt_1T = (torch.arange(conditions.tokens, device=device) % rows)[None]
        out: Any = None

        def read() -> None:
            nonlocal out
            out = network(prompt_1T, use_cache=True, logits_to_keep=1)

        def write() -> None:
            nonlocal out
            for _ in range(conditions.new):
                token_11 = out.logits[:, -1:].argmax(-1)
                cache = with_cache(network, cache_of(out))
                out = network(token_11, use_cache=True, **cache)

        first, rest = milliseconds(read, device) / 1e3, milliseconds(write, device) / 1e3
        peaks = peak_memory_bytes(memory, device)
    return _Round(first, rest, peaks.get(" GPU", peaks[""]))
