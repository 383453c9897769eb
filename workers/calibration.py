"""Text in, token windows out: read once, tokenised as a whole, cut without overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.specs.texts import OwnDocuments, TextSpec, WindowsSpec
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
    opening: tuple[int, ...] = ()
    """What stands in place of every window's own first tokens."""


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
    """The special tokens of every window."""

    before: tuple[int, ...]
    behind: tuple[int, ...] = ()
    replaces: bool = False
    """Whether they stand in place of the window's own tokens, of a text that was tokenised with
    special tokens (a decoder's), or beside them, of one that was not (an encoder's).
    """

    @property
    def size(self) -> int:
        """Tokens that they leave less of a text."""
        return 0 if self.replaces else len(self.before) + len(self.behind)

    def around(self, windows_NT: Tensor) -> Tensor:
        """Windows with them."""
        sides = (torch.tensor(ids, dtype=torch.int64) for ids in (self.before, self.behind))
        before_NT, behind_NT = (ids_T.expand(len(windows_NT), -1) for ids_T in sides)
        inside_NT = windows_NT[:, before_NT.shape[1] :] if self.replaces else windows_NT
        return torch.cat([before_NT, inside_NT, behind_NT], 1)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What a tokenizer puts around a text by itself.

    Raises:
        ModelError: it changes the text by it.
    """
    if (found := _around_a_text(tokenizer)) is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer gives {_WORD!r} other tokens where it adds"
            " special ones; give token ids instead of text"
        )
    return found


AS_CUT = Frame((), replaces=True)
"""Of windows that stay as they are cut."""


def opening_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What a tokenizer puts before a text by itself, maybe nothing, for windows out of the middle
    of one.

    A decoder has seen nothing without it, if its tokenizer adds it: Gemma 3 270M has a perplexity
    of 107 on windows of WikiText-2 as they are cut, and of 47 where each begins with BOS.
    """
    found = _around_a_text(tokenizer)
    return Frame(found.before, replaces=True) if found else AS_CUT


def _around_a_text(tokenizer: PreTrainedTokenizerBase) -> Frame | None:
    inside = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_WORD)["input_ids"]
    starts = (n for n in range(len(whole)) if whole[n : n + len(inside)] == inside)
    start = next(starts, None)
    if start is None:
        return None
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
    """A decoder's first windows of every text, in turn as their shares demand, shape (samples,
    sequence_length), int64.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    return read_calibration(spec, tokenizer, opening_of(tokenizer))[0]


def read_calibration(
    spec: WindowsSpec,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    option: str = "calibration",
    reader: str | None = None,
) -> tuple[Tensor, list[ReadText]]:
    """The windows of `calibration_windows`, and those of each text; in their frame, as far as the
    job wants it. `option` is where the job has the texts, `reader` who takes so many windows.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    wanted = windows_of_texts(spec, option)
    length = spec.sequence_length
    frame = _wanted(frame, spec.bos)
    read = [
        _first_windows(text, tokenizer, count, length, frame, option=option, reader=reader)
        for text, count in wanted
    ]
    order = order_of_windows(spec, option)
    return torch.stack([read[number].windows_NT[place] for number, place in order]), read


def read_behind(
    spec: WindowsSpec,
    read: Sequence[int],
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
) -> tuple[Tensor, list[ReadText]]:
    """So many windows (S, T) of all texts together, each text's behind those that any of the
    numbers of samples in `read` takes of it; and those of each text. In their frame, as far as the
    job wants it.

    Raises:
        SpecError: a text is too short.
    """
    texts, frame = [], _wanted(frame, spec.bos)
    for text, first, count in windows_behind(spec, read, samples):
        whole = _first_windows(text, tokenizer, first + count, spec.sequence_length, frame, count)
        texts.append(ReadText(whole.path, whole.windows_NT[first:], whole.facts))
    return torch.cat([text.windows_NT for text in texts]), texts


def _first_windows(
    spec: TextSpec,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    frame: Frame,
    gate: int = 0,
    option: str = "calibration",
    reader: str | None = None,
) -> ReadText:
    """The first windows of one text of an option, `gate` of them those of a gate."""
    tokens, facts = _tokens(spec, tokenizer, samples * sequence_length, frame.replaces)
    frame = _framing(frame, facts, spec)
    inside = sequence_length - frame.size
    if len(tokens) < samples * inside:
        raise too_few_samples(spec, samples, inside, len(tokens), gate, option, reader)
    windows_NT = tokens[: samples * inside].reshape(samples, inside)
    return _framed(spec, windows_NT, facts, frame)


def _framed(text: TextSpec, windows_NT: Tensor, facts: TextFacts, frame: Frame) -> ReadText:
    opening = frame.before if frame.replaces else ()
    return ReadText(text.path, frame.around(windows_NT), facts, opening)


def _wanted(frame: Frame, bos: bool) -> Frame:
    """The frame, unless it is a decoder's and the job does without."""
    return AS_CUT if frame.replaces and not bos else frame


def _framing(frame: Frame, facts: TextFacts, text: TextSpec) -> Frame:
    """The frame, unless a text that others have made holds token ids: those are taken as they are.

    Raises:
        SpecError: an encoder's holds both.
    """
    if "token ids" not in facts.holds or isinstance(text, OwnDocuments):
        return frame
    if len(facts.holds) > 1 and not frame.replaces:
        raise SpecError(
            f"{text.path}: holds {' and '.join(facts.holds)}; an encoder's token ids are taken as"
            " they are, all else gets its special tokens: make two files of it"
        )
    return AS_CUT


def evaluation_windows(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A decoder's windows of all texts, shape (windows, window), int64; a text's incomplete last
    one is dropped.

    Raises:
        SpecError: a text has not one whole window.
    """
    frame = opening_of(tokenizer)
    read = [read_evaluation(spec, text, tokenizer, frame) for text in spec.by_name.values()]
    return torch.cat([text.windows_NT for text in read])


def read_evaluation(
    spec: EvaluationSpec, text: TextSpec, tokenizer: PreTrainedTokenizerBase, frame: Frame
) -> ReadText:
    """The windows of one text, and what it was found to be; in their frame, as far as the job wants
    it, an encoder's without overlap.

    Raises:
        SpecError: not one whole window.
    """
    stride, frame = spec.effective_stride, _wanted(frame, spec.bos)
    tokens, facts = _tokens(
        text,
        tokenizer,
        None if spec.max_windows is None else (spec.max_windows - 1) * stride + spec.window,
        frame.replaces,
    )
    frame = _framing(frame, facts, text)
    inside = spec.window - frame.size
    if spec.window <= len(frame.before) + len(frame.behind):
        raise SpecError(f"evaluation.window: special tokens fill {spec.window}; raise it")
    if len(tokens) < inside:
        raise no_window(text, spec.window, len(tokens))
    windows_NT = tokens.unfold(0, inside, min(stride, inside))[: spec.max_windows].contiguous()
    return _framed(text, windows_NT, facts, frame)
