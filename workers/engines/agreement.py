"""Whether an engine goes on as transformers does in float32.

Legend: T tokens, V vocabulary. Engines round otherwise: where two tokens are all but equally
likely, one may take the other. So the first token that differs is judged by how much likelier
transformers finds its own: by the difference of the two logits, in nats.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rayprune.specs.errors import SpecError, VerificationError
from rayprune.workers.engines.engine import ENGINES, Engine, Tokens
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.load_check import loaded
from rayprune.workers.store.layout import CALIBRATION_TASK, TOKENS_FILE, converted_task, task_folder

PROMPTS, PROMPT, COUNT = 8, 32, 32
"""Texts that are gone on with, their tokens, and the tokens that are compared."""
TIES = {"transformers": 1e-3, "gguf-q8_0": 0.5}
"""Nats below which two tokens are a tie, by target; rounding to 16 bits, `TIE`, for the rest."""
TIE = 0.1


@dataclass(frozen=True)
class Agreement:
    """How far an engine went along."""

    target: str
    texts: int
    compared: int
    """Tokens up to the first that differs, over all texts."""
    ties: tuple[float, ...]
    """Of texts that part at a tie: by how much, in nats."""


def prompts_of(file: Path) -> list[Tokens]:
    """Beginnings of windows of a calibration text, evenly spread."""
    windows_ST = load_file(file)["tokens"]
    step = max(1, len(windows_ST) // PROMPTS)
    return [list(map(int, window_T[:PROMPT])) for window_T in windows_ST[::step][:PROMPTS]]


def compare_run(name: str, run: Path, model: Path, targets: Collection[str]) -> Iterator[Agreement]:
    """Compare every form of a run's `model` that the engine of this name reads; `targets` are those
    that have folders of their own.

    Raises:
        SpecError: the run has no such form, or its model is an encoder.
        VerificationError: the engine takes other tokens.
        ResourceError: it is not installed.
    """
    engine = ENGINES[name]
    if not open_checkpoint(model).model.causal:
        raise SpecError(f"{model}: is an encoder, which goes on with no text; leave --engine out")
    prompts = prompts_of(task_folder(run, CALIBRATION_TASK) / TOKENS_FILE)
    for target, folder in _forms(engine, run, model, targets):
        yield compare(engine, target, folder, model, prompts)


def _forms(
    engine: Engine, run: Path, model: Path, targets: Collection[str]
) -> list[tuple[str, Path]]:
    folders = {target: task_folder(run, converted_task(target)) for target in targets}
    if engine.name != "llama.cpp":
        folder = folders.get(engine.name, model)
        if folder == model and engine.name != "transformers" and any(model.glob("*.py")):
            raise SpecError(
                f"{model}: its layers differ in size, and {engine.name} does not run the class that"
                " lies beside them; run the job again with export.pad, or for vLLM with"
                " export.target: [vllm]; finished tasks are kept"
            )
        return [(engine.name, folder)]
    files = [(t, file) for t, folder in folders.items() for file in folder.glob("*.gguf")]
    if not files:
        raise SpecError(
            f"{run}: has no file for llama.cpp; run the job again with --set export.target=[gguf],"
            " finished tasks are kept"
        )
    return files


def compare(
    engine: Engine, target: str, folder: Path, model: Path, prompts: Sequence[Tokens]
) -> Agreement:
    """Let an engine go on in a `folder` or file, and compare with transformers in `model`.

    Raises:
        VerificationError: it takes other tokens.
        ResourceError: it is not installed.
    """
    version = engine.version
    found = engine.greedy()(folder, prompts, COUNT)
    network = loaded(model, torch.float32)
    told = [
        _parts_at(network, prompt, tokens) for prompt, tokens in zip(prompts, found, strict=True)
    ]
    tie = TIES.get(target, TIE)
    for number, (place, margin) in enumerate(told):
        if margin is not None and margin > tie:
            raise VerificationError(
                f"{folder}: {engine.name} ({version}) goes on otherwise than transformers in"
                f" float32: token {place} of text {number} is {margin:.3g} nats less likely there"
                f" than its own (a tie is below {tie})"
            )
    ties = tuple(margin for _, margin in told if margin is not None)
    return Agreement(target, len(told), sum(place for place, _ in told), ties)


@torch.inference_mode()
def _parts_at(network: Any, prompt: Tokens, found: Tokens) -> tuple[int, float | None]:
    """How many tokens are those that float32 takes, and by how much the next one is less likely;
    None: there is none, or both have ended.
    """
    logits_TV: Tensor = network(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 :]
    best_T = logits_TV.argmax(-1).tolist()
    for place, token in enumerate(found):
        if token != best_T[place]:
            return place, float(logits_TV[place, best_T[place]] - logits_TV[place, token])
    given = network.generation_config.eos_token_id
    ends = set(given if isinstance(given, list) else [given]) - {None}
    behind, has_ended = len(found), bool(ends.intersection(found[-1:]))
    if behind == COUNT or has_ended or best_T[behind] in ends:
        return behind, None
    likeliest = max((float(logits_TV[behind, end]) for end in ends), default=-math.inf)
    return behind, float(logits_TV[behind].max()) - likeliest


def described(name: str, found: Agreement) -> str:
    """An agreement in a line."""
    ties = (
        f", {len(found.ties)} part at a tie (within {max(found.ties):.2g} nats)"
        if found.ties
        else ""
    )
    form = "the folder" if found.target == name else found.target
    return (
        f"{form} in {name} ({ENGINES[name].version}): {found.compared} tokens of"
        f" {found.texts} texts as transformers in float32{ties}"
    )
