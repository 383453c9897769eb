"""Measures models side by side in transformers on the CPU: reading a prompt, writing behind it.

Every model lives in a process of its own, so that each has a peak of memory of its own, and all of
them run in turns, so that what else the machine does meets all alike. Medians count.
"""

import statistics
import time
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
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.load_check import loaded


@dataclass(frozen=True)
class Speed:
    """What one model takes."""

    model: Path
    parameters: int
    bytes_on_disk: int
    kv_bytes_per_token: int
    """Keys and values of a token in all layers, in the type that is computed in."""
    first_token_seconds: float
    """From a prompt to the first token."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    """Private memory of its process, at most."""
    prefill_ratio: float
    """Speed over the first model's, in the same round: the median."""
    decode_ratio: float


@dataclass(frozen=True)
class _Round:
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int


def bench(
    models: Sequence[Path], tokens: int, new: int, rounds: int, threads: int, dtype: str
) -> Iterator[Speed]:
    """Measure models: `new` tokens behind a prompt of `tokens`, in so many rounds.

    Raises:
        ModelError: no such model, or one that is not known.
        SpecError: a number is too small.
    """
    if min(tokens, new, rounds, threads) < 1:
        raise SpecError("--tokens, --new, --rounds and --threads must be at least 1")
    checkpoints = [open_checkpoint(model) for model in models]
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for _ in models
        ]
        found: list[list[_Round]] = [[] for _ in models]
        for number in range(rounds + 1):  # the first one loads and warms up
            for pool, model, times in zip(pools, models, found, strict=True):
                done = pool.submit(_measure, model, tokens, new, threads, dtype).result()
                times += [done] if number else []
    for checkpoint, times in zip(checkpoints, found, strict=True):
        prefill, decode = ([getattr(r, name) for r in times] for name in _TIMES)
        paired = [
            [getattr(b, name) / getattr(t, name) for b, t in zip(found[0], times, strict=True)]
            for name in _TIMES
        ]
        element = torch.finfo(getattr(torch, dtype)).bits // 8
        yield Speed(
            checkpoint.path,
            checkpoint.parameters,
            checkpoint.bytes_on_disk,
            element
            * sum(g.num_units * g.cached for each in checkpoint.model.layers for g in each.groups),
            statistics.median(prefill),
            tokens / statistics.median(prefill),
            new / statistics.median(decode),
            max(each.peak_memory_bytes for each in times),
            statistics.median(paired[0]),
            statistics.median(paired[1]),
        )


_TIMES = ("prefill_seconds", "decode_seconds")


@cache
def _loaded(model: Path, threads: int, dtype: str) -> Any:
    torch.set_num_threads(threads)
    return loaded(model, getattr(torch, dtype))


@torch.inference_mode()
def _measure(model: Path, tokens: int, new: int, threads: int, dtype: str) -> _Round:
    """One round of one model, in its process."""
    with PeakMemory() as memory:
        network = _loaded(model, threads, dtype)
        rows = network.get_input_embeddings().num_embeddings
        prompt_1T = torch.arange(tokens)[None] % rows
        start = time.perf_counter()
        out = network(prompt_1T, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(new):
            token_11 = out.logits[:, -1:].argmax(-1)
            out = network(token_11, past_key_values=out.past_key_values, use_cache=True)
        last = time.perf_counter()
    return _Round(first - start, last - first, memory.bytes)
