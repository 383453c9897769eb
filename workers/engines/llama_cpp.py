"""llama.cpp by the package xllamacpp, which brings it compiled: a server for this machine alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

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


def ask(running: Any, request: Mapping[str, object]) -> Any:
    """What a server answers to a completion's options.

    Raises:
        VerificationError: it answers with an error.
    """
    # not `handle_completions`, which leaves out tokens that are parts of a character
    address = f"{running.listening_address}/completion"
    body = json.dumps({"temperature": 0.0, "top_k": 1, "cache_prompt": False, **request}).encode()
    try:
        with urlopen(Request(address, body, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise VerificationError(f"llama.cpp cannot go on with a text: {error.read()!r}") from None


def greedy(file: Path, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Go on with the likeliest tokens.

    Raises:
        VerificationError: llama.cpp does not load the file, or cannot go on.
    """
    running = server(file, 2 * (max(map(len, prompts)) + count))
    wanted = {"n_predict": count, "return_tokens": True}
    return [ask(running, {"prompt": prompt, **wanted})["tokens"] for prompt in prompts]
