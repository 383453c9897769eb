"""llama.cpp by the package xllamacpp, which brings it compiled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp

from rayprune.specs.errors import VerificationError
from rayprune.workers.engines.engine import Tokens


def server(file: Path, context: int, threads: int = 1) -> Any:
    """A file in memory, for one text at a time.

    Raises:
        VerificationError: llama.cpp does not load it.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = -1
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise VerificationError(f"{file}: does not load in llama.cpp: {error}") from None


def greedy(file: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on with the likeliest tokens.

    Raises:
        VerificationError: llama.cpp does not load the file, or cannot go on.
    """
    running = server(file, 2 * (max(map(len, prompts)) + count))
    found = []
    for prompt in prompts:
        answer = running.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0.0,
                "top_k": 1,
                "logprobs": 1,  # with which it tells the ids of tokens
                "cache_prompt": False,
            }
        )
        if "choices" not in answer:
            raise VerificationError(f"{file}: llama.cpp cannot go on with a text: {answer}")
        told = answer["choices"][0]["logprobs"]["content"]
        found.append([int(token["id"]) for token in told])
    return found
