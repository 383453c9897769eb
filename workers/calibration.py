"""Text in, token windows out: read once, tokenised as a whole, cut without overlap."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.job import CalibrationSpec, EvaluationSpec, TextSpec

_CHARACTERS_PER_TOKEN = 8
SHARED_RUN = 64
"""Tokens in a row that two texts do not have in common by chance."""
SHARED_FRACTION = 0.01
"""Of the evaluation tokens, so many may lie in such runs: quotations and boilerplate."""
_CHUNK = 2**16


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, from its folder alone.

    Raises:
        ModelError: the folder has none.
    """
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


def _documents(spec: TextSpec) -> Iterator[str]:
    path = Path(spec.path)
    with path.open(encoding="utf-8") as handle:
        if not spec.is_jsonl:
            while chunk := handle.read(2**20):
                yield chunk
            return
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield _text_field(line, spec, f"{path}:{number}") + "\n\n"


def _text_field(line: str, spec: TextSpec, where: str) -> str:
    try:
        value = json.loads(line)[spec.field]
    except (ValueError, RecursionError):
        raise SpecError(f"{where}: no JSON; set format: text for plain text") from None
    except (KeyError, TypeError):
        raise SpecError(
            f"{where}: no key {spec.field!r}; set field to the key that holds the text"
        ) from None
    if not isinstance(value, str):
        raise SpecError(f"{where}: {spec.field!r} holds no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SpecError(
            f"{where}: {spec.field!r} holds half a surrogate pair, which is no text"
        ) from None
    return value


def _read(spec: TextSpec, max_characters: int | None) -> tuple[str, bool]:
    """The text's first characters, and whether that is all of it."""
    parts: list[str] = []
    length = 0
    try:
        for part in _documents(spec):
            parts.append(part)
            length += len(part)
            if max_characters is not None and length > max_characters:
                return "".join(parts)[:max_characters], False
    except OSError as error:
        raise SpecError(f"{spec.path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{spec.path}: not UTF-8 ({error.reason}); convert it first") from None
    return "".join(parts), True


def tokenize(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Tensor:
    """The text's first `max_tokens` tokens (all of them for None), special tokens as the tokenizer
    adds them by itself.

    No more of a large file is read than the tokens need. Shape (tokens,), int64.

    Raises:
        SpecError: the file cannot be read, or a line of JSON Lines has no text.
    """
    characters = None if max_tokens is None else max_tokens * _CHARACTERS_PER_TOKEN
    while True:
        text, complete = _read(spec, characters)
        ids = tokenizer(text, verbose=False)["input_ids"]
        # a cut text's last tokens may differ
        if complete or (max_tokens is not None and len(ids) > max_tokens + 64):
            return torch.tensor(ids[:max_tokens], dtype=torch.int64)
        assert characters is not None
        characters *= 2


def calibration_windows(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first windows of every text, in turn as their shares demand, shape (samples,
    sequence_length), int64.

    Raises:
        SpecError: a text is too short, or its weight too small for a single window.
    """
    texts: list[TextSpec] = [spec, *spec.mix]
    counts = shares(spec.samples, [1.0, *(text.weight for text in spec.mix)])
    for text, count in zip(texts, counts, strict=True):
        if count == 0:
            raise SpecError(
                f"{text.path}: its weight gives it none of the {spec.samples} samples; raise the"
                " weight or calibration.samples"
            )
    windows = [
        _first_windows(text, tokenizer, count, spec.sequence_length)
        for text, count in zip(texts, counts, strict=True)
    ]
    turns = sorted(
        ((place + 0.5) / count, number, place)
        for number, count in enumerate(counts)
        for place in range(count)
    )
    return torch.stack([windows[number][place] for _, number, place in turns])


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` things in proportion to weights, whole ones: the largest remainders round up, ties
    the earlier first.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(
        range(len(weights)), key=lambda number: (counts[number] - exact[number], number)
    )
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _first_windows(
    spec: TextSpec, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int
) -> Tensor:
    """The first windows of one text."""
    tokens = tokenize(spec, tokenizer, samples * sequence_length)
    if len(tokens) < samples * sequence_length:
        raise SpecError(
            f"{spec.path}: too short: {samples} samples of {sequence_length} tokens need"
            f" {samples * sequence_length} tokens, the text has {len(tokens)}; give a longer text,"
            " or lower calibration.samples or calibration.sequence_length"
        )
    return tokens.reshape(samples, sequence_length)


def evaluation_windows(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows of the text, shape (windows, window), int64; an incomplete last one is dropped.

    Raises:
        SpecError: not one whole window.
    """
    stride = spec.effective_stride
    tokens = tokenize(
        spec,
        tokenizer,
        None if spec.max_windows is None else (spec.max_windows - 1) * stride + spec.window,
    )
    if len(tokens) < spec.window:
        raise SpecError(
            f"{spec.path}: too short: one window needs {spec.window} tokens, the text has"
            f" {len(tokens)}; lower evaluation.window"
        )
    return tokens.unfold(0, spec.window, stride).contiguous()


def check_apart(calibration_ST: Tensor, evaluation_NT: Tensor, path: str) -> None:
    """Refuse to judge a model by the text it was calibrated or trained on.

    Raises:
        SpecError: more than `SHARED_FRACTION` of the evaluation tokens lie in runs that the
            calibration text has too.
    """
    fraction = shared_fraction(calibration_ST, evaluation_NT)
    if fraction > SHARED_FRACTION:
        raise SpecError(
            f"evaluation.path: {path}: {fraction:.0%} of its tokens stand in the windows for"
            " calibration or training too, so perplexity would flatter the pruned model; evaluate"
            " on other text, for instance the part behind those windows"
        )


def shared_fraction(calibration_ST: Tensor, evaluation_NT: Tensor) -> float:
    """The fraction of evaluation tokens in runs of `SHARED_RUN` tokens (at most half a window) that
    calibration windows hold too.

    The calibration windows are cut into runs, every run of the evaluation windows is compared with
    all of them, by hash. Runs that lie in two windows are not seen: where windows are short, up to
    half of what there is; of very short ones nothing is said.
    """
    size = min(SHARED_RUN, calibration_ST.shape[1] // 2, evaluation_NT.shape[1] // 2)
    if size < SHARED_RUN // 4:
        return 0.0
    # products wrap around: a hash
    factors = torch.randint(2**62, (size,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    runs = calibration_ST[:, : calibration_ST.shape[1] // size * size].reshape(-1, size)
    known = (runs * factors).sum(1)
    chunks = evaluation_NT.unfold(1, size, 1).split(max(1, _CHUNK // evaluation_NT.shape[1]))
    hits = sum(int(torch.isin((chunk * factors).sum(-1), known).sum()) for chunk in chunks)
    return min(1.0, hits * size / evaluation_NT.numel())
