"""Text in, token windows out: read once, tokenised as a whole, cut without overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.specs.texts import TextSpec, WindowsSpec
from rayprune.workers.stock import stock_config
from rayprune.workers.texts.limits import (
    no_window,
    order_of_windows,
    too_few_samples,
    windows_behind,
    windows_of_texts,
)
from rayprune.workers.texts.reading import TextFacts, read_tokens
from rayprune.workers.texts.tokenizer import fast_encoder

MASKED_EVERY = 7
"""One token in so many is masked where a masked-language model is judged: 14%, near BERT's 15%."""
_WORD = "a"


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
    spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, special: bool = True
) -> tuple[Tensor, TextFacts]:
    ids, facts = read_tokens(spec, tokenizer, max_tokens, special)
    return torch.tensor(ids, dtype=torch.int64), facts


@dataclass(frozen=True)
class Frame:
    """The special tokens that stand before and behind every text that an encoder reads."""

    before: tuple[int, ...]
    behind: tuple[int, ...]

    def around(self, windows_NT: Tensor) -> Tensor:
        """Windows with them."""
        sides = (torch.tensor(ids, dtype=torch.int64) for ids in (self.before, self.behind))
        before_NT, behind_NT = (ids_T.expand(len(windows_NT), -1) for ids_T in sides)
        return torch.cat([before_NT, windows_NT, behind_NT], 1)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What a tokenizer puts around a text by itself.

    Raises:
        ModelError: it changes the text by it.
    """
    inside = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_WORD)["input_ids"]
    starts = (n for n in range(len(whole)) if whole[n : n + len(inside)] == inside)
    if (start := next(starts, None)) is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer gives {_WORD!r} other tokens where it adds"
            " special ones; give token ids instead of text"
        )
    return Frame(tuple(whole[:start]), tuple(whole[start + len(inside) :]))


def masked(windows_NT: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows in which every seventh token is masked, in each beginning one earlier than in the
    one before; special tokens are not.

    Raises:
        ModelError: the tokenizer has no mask.
        SpecError: windows are so short that there is nothing to mask.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has no mask token, so the masked-language-"
            "model loss cannot be measured; leave evaluation out, or add mask_token to the"
            " tokenizer's config"
        )
    windows, positions = torch.meshgrid(*map(torch.arange, windows_NT.shape), indexing="ij")
    chosen = (positions + windows) % MASKED_EVERY == MASKED_EVERY - 1
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
    chosen &= ~torch.isin(windows_NT, special)
    if not chosen.any():
        raise SpecError("evaluation.window: too short, not one token is masked; raise it")
    return windows_NT.masked_fill(chosen, tokenizer.mask_token_id)


def calibration_windows(spec: WindowsSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first windows of every text, in turn as their shares demand, shape (samples,
    sequence_length), int64.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    return read_calibration(spec, tokenizer)[0]


def read_calibration(
    spec: WindowsSpec,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame | None = None,
    option: str = "calibration",
) -> tuple[Tensor, list[ReadText]]:
    """The windows of `calibration_windows`, and those of each text; an encoder's in their frame.
    `option` is where the job has the texts.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    wanted = windows_of_texts(spec, option)
    length = spec.sequence_length
    read = [_first_windows(text, tokenizer, n, length, frame, option=option) for text, n in wanted]
    order = order_of_windows(spec, option)
    return torch.stack([read[number].windows_NT[place] for number, place in order]), read


def read_behind(
    spec: WindowsSpec, read: Sequence[int], samples: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, list[ReadText]]:
    """So many windows (S, T) of all texts together, each text's behind those that any of the
    numbers of samples in `read` takes of it; and those of each text.

    Raises:
        SpecError: a text is too short.
    """
    texts = []
    for text, first, count in windows_behind(spec, read, samples):
        whole = _first_windows(text, tokenizer, first + count, spec.sequence_length, None, count)
        texts.append(ReadText(whole.path, whole.windows_NT[first:], whole.facts))
    return torch.cat([text.windows_NT for text in texts]), texts


def _first_windows(
    spec: TextSpec,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    frame: Frame | None,
    gate: int = 0,
    option: str = "calibration",
) -> ReadText:
    """The first windows of one text of an option, `gate` of them those of a gate."""
    tokens, facts = _tokens(spec, tokenizer, samples * sequence_length, special=frame is None)
    frame = _framing(frame, facts, spec)
    inside = sequence_length - _size(frame)
    if len(tokens) < samples * inside:
        raise too_few_samples(spec, samples, inside, len(tokens), gate, option)
    windows_NT = tokens[: samples * inside].reshape(samples, inside)
    return ReadText(spec.path, frame.around(windows_NT) if frame else windows_NT, facts)


def _framing(frame: Frame | None, facts: TextFacts, text: TextSpec) -> Frame | None:
    """The frame, unless a text holds token ids: those are taken as they are.

    Raises:
        SpecError: it holds both.
    """
    if frame is None or "token ids" not in facts.holds:
        return frame
    if len(facts.holds) > 1:
        raise SpecError(
            f"{text.path}: holds {' and '.join(facts.holds)}; an encoder's token ids are taken as"
            " they are, all else gets its special tokens: make two files of it"
        )
    return None


def _size(frame: Frame | None) -> int:
    return len(frame.before) + len(frame.behind) if frame else 0


def evaluation_windows(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows of all texts, shape (windows, window), int64; a text's incomplete last one is
    dropped.

    Raises:
        SpecError: a text has not one whole window.
    """
    read = [read_evaluation(spec, text, tokenizer) for text in spec.by_name.values()]
    return torch.cat([text.windows_NT for text in read])


def read_evaluation(
    spec: EvaluationSpec,
    text: TextSpec,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame | None = None,
) -> ReadText:
    """The windows of one text, and what it was found to be; an encoder's in their frame, without
    overlap.

    Raises:
        SpecError: not one whole window.
    """
    stride = spec.effective_stride
    tokens, facts = _tokens(
        text,
        tokenizer,
        None if spec.max_windows is None else (spec.max_windows - 1) * stride + spec.window,
        special=frame is None,
    )
    frame = _framing(frame, facts, text)
    inside = spec.window - _size(frame)
    if inside < 1:
        raise SpecError(f"evaluation.window: special tokens fill {spec.window}; raise it")
    if len(tokens) < inside:
        raise no_window(text, spec.window, len(tokens))
    windows_NT = tokens.unfold(0, inside, min(stride, inside))[: spec.max_windows].contiguous()
    return ReadText(text.path, frame.around(windows_NT) if frame else windows_NT, facts)
