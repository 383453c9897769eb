"""Text in, token windows out: read once, tokenised as a whole, cut without overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayprune.specs.errors import ModelError
from rayprune.specs.job import CalibrationSpec, EvaluationSpec, TextSpec
from rayprune.workers.stock import stock_config
from rayprune.workers.texts.limits import (
    no_window,
    too_few_samples,
    windows_behind,
    windows_of_texts,
)
from rayprune.workers.texts.reading import TextFacts, read_tokens
from rayprune.workers.texts.tokenizer import fast_encoder


@dataclass(frozen=True)
class ReadText:
    """The windows of one text (N, T), int64, and what it was found to be."""

    path: str
    windows_NT: Tensor
    facts: TextFacts


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, from its folder alone.

    Raises:
        ModelError: the folder has none, its packages are missing, or its config is wrong.
    """
    if (model / "config.json").exists():
        stock_config(model)  # the tokenizer reads it too, and would be blamed for it
    fast_encoder(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, trust_remote_code=False, local_files_only=True
        )
    # from a foreign library: a damaged file is met with KeyError, TypeError, even plain Exception
    except Exception as error:
        raise ModelError(
            f"{model}: no usable tokenizer ({error}); copy the tokenizer's files into the model"
            " folder"
        ) from None
    return tokenizer


def tokenize(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Tensor:
    """The text's first `max_tokens` tokens (all of them for None), special tokens as the tokenizer
    adds them by itself.

    No more of a large file is read than the tokens need. Shape (tokens,), int64.

    Raises:
        SpecError: a file cannot be read, or is not what it should be.
    """
    return _tokens(spec, tokenizer, max_tokens)[0]


def _tokens(
    spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> tuple[Tensor, TextFacts]:
    ids, facts = read_tokens(spec, tokenizer, max_tokens)
    return torch.tensor(ids, dtype=torch.int64), facts


def calibration_windows(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first windows of every text, in turn as their shares demand, shape (samples,
    sequence_length), int64.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    return read_calibration(spec, tokenizer)[0]


def read_calibration(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, list[ReadText]]:
    """The windows of `calibration_windows`, and those of each text.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    wanted = windows_of_texts(spec)
    read = [_first_windows(text, tokenizer, n, spec.sequence_length) for text, n in wanted]
    turns = sorted(
        ((place + 0.5) / count, number, place)
        for number, (_, count) in enumerate(wanted)
        for place in range(count)
    )
    return torch.stack([read[number].windows_NT[place] for _, number, place in turns]), read


def read_behind(
    spec: CalibrationSpec, read: Sequence[int], samples: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, list[ReadText]]:
    """So many windows (S, T) of all texts together, each text's behind those that any of the
    numbers of samples in `read` takes of it; and those of each text.

    Raises:
        SpecError: a text is too short.
    """
    texts = []
    for text, first, count in windows_behind(spec, read, samples):
        whole = _first_windows(text, tokenizer, first + count, spec.sequence_length, count)
        texts.append(ReadText(whole.path, whole.windows_NT[first:], whole.facts))
    return torch.cat([text.windows_NT for text in texts]), texts


def _first_windows(
    spec: TextSpec,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    gate: int = 0,
) -> ReadText:
    """The first windows of one text, `gate` of them those of a gate."""
    tokens, facts = _tokens(spec, tokenizer, samples * sequence_length)
    if len(tokens) < samples * sequence_length:
        raise too_few_samples(spec, samples, sequence_length, len(tokens), gate)
    return ReadText(spec.path, tokens.reshape(samples, sequence_length), facts)


def evaluation_windows(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows of the text, shape (windows, window), int64; an incomplete last one is dropped.

    Raises:
        SpecError: not one whole window.
    """
    return read_evaluation(spec, tokenizer).windows_NT


def read_evaluation(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase) -> ReadText:
    """The windows of `evaluation_windows`, and what the text was found to be.

    Raises:
        SpecError: not one whole window.
    """
    stride = spec.effective_stride
    tokens, facts = _tokens(
        spec,
        tokenizer,
        None if spec.max_windows is None else (spec.max_windows - 1) * stride + spec.window,
    )
    if len(tokens) < spec.window:
        raise no_window(spec, len(tokens))
    return ReadText(spec.path, tokens.unfold(0, spec.window, stride).contiguous(), facts)
