"""A tokenizer as llama.cpp has it: its kind, how it cuts text before merging, tokens with their
types.

llama.cpp has the cutting in code, under names. A tokenizer is written if its own is one of those,
and refused by name if it is not: another one would read text otherwise, without an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rayprune.specs.errors import ModelError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
_TEKKEN = rf"{_CASES}\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: Mapping[tuple[str, ...], tuple[str, bool]] = {
    ("GPT-2",): ("gpt-2", False),
    ("Digits", "GPT-2"): ("smollm", False),
    (rf"{_SHORT}{_WORDS}\p{{N}}{{1,3}}{_REST}", "ByteLevel"): ("llama-bpe", True),
    (rf"{_SHORT}{_WORDS}\p{{N}}{_REST}", "ByteLevel"): ("qwen2", False),
    (_TEKKEN, "ByteLevel"): ("tekken", True),
}
"""llama.cpp's name, and whether it takes whole words before it merges, by the steps of a
`tokenizer.json`."""
TOKENIZER = "tokenizer.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_METASPACE = "▁"


class TokenType(IntEnum):
    """What llama.cpp takes a token for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, as many as the embeddings have rows."""

    kind: str
    """`gpt2`: merges of bytes; `llama`: pieces of characters, with scores."""
    cut: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] | None
    space_in_front: bool


def vocabulary(raw: Mapping[str, Any], rows: int, file: str) -> Vocabulary:
    """The tokens of a `tokenizer.json`, which stands in `file`, padded to so many rows.

    Raises:
        ModelError: llama.cpp has none like it, or it has more tokens than rows.
    """
    model, added_tokens = raw["model"], raw.get("added_tokens") or []
    # older files do not name it; of the others none has merges
    kind = model.get("type") or ("BPE" if "merges" in model else "without a name")
    if kind != "BPE":
        raise _unknown(file, f"a model of type {kind}")
    if not model.get("merges"):
        raise _unknown(file, "a model without merges")
    pieces = bool(model.get("byte_fallback"))
    cut, in_front = _pieces(raw, file) if pieces else (_cut(raw, file), False)
    ids: dict[str, int] = {**model["vocab"], **{t["content"]: t["id"] for t in added_tokens}}
    if ids and max(ids.values()) >= rows:
        raise ModelError(
            f"{file}: has a token {max(ids.values())}, but the embeddings have {rows} rows"
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, number in ids.items():
        tokens[number] = token
        types[number] = TokenType.BYTE if pieces and _BYTE.fullmatch(token) else TokenType.NORMAL
    for added in added_tokens:
        special = bool(added["special"])
        types[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    if pieces and model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = TokenType.UNKNOWN
    scores = _scores(model["merges"], tokens) if pieces else None
    return Vocabulary("llama" if pieces else "gpt2", cut, tokens, types, scores, in_front)


def _cut(raw: Mapping[str, Any], file: str) -> str:
    """llama.cpp's name of how text is cut into words."""
    steps = _steps(raw.get("pre_tokenizer"))
    normalizer = raw.get("normalizer") or {"type": "NFC"}
    whole = bool(raw["model"].get("ignore_merges"))
    name, takes_whole = CUTS.get(steps, ("", False))
    if not name or whole != takes_whole or normalizer["type"] != "NFC":
        words = ", ".join(steps) or "nothing"
        raise _unknown(file, f"a pre_tokenizer of {words[:200]}, normalizer {normalizer['type']}")
    return name


def _steps(given: Mapping[str, Any] | None) -> tuple[str, ...]:
    match given:
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(step for part in parts for step in _steps(part))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return ("GPT-2" if regex else "ByteLevel",)
        case {"type": "Digits", "individual_digits": True}:
            return ("Digits",)
        case {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (regex,)
        case None:
            return ()
    return (str(given),)


def _pieces(raw: Mapping[str, Any], file: str) -> tuple[str, bool]:
    """The cut of sentencepiece's kind, and whether a space is put in front of a text."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _METASPACE}
    match raw.get("normalizer"), raw.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [{"type": "Prepend"}, last]}, None if (
            last == space
        ):
            return "default", True
        case last, None if last == space:
            return "default", False
        case None, {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": how}:
            return "default", how != "never"
    raise _unknown(file, "pieces of characters with a normalizer or pre_tokenizer of its own")


def _scores(merges: Sequence[Any], tokens: Sequence[str]) -> list[float]:
    """What is merged first has the highest score; what no merge makes, the lowest."""
    made: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, -float(rank))
    return [made.get(token, -float(len(merges))) for token in tokens]


def _unknown(file: str, what: str) -> ModelError:
    names = ", ".join(name for name, _ in CUTS.values())
    return ModelError(
        f"{file}: {what} is not one of llama.cpp's that are known here ({names}, and pieces of"
        " Llama 2's kind); leave gguf out of export.target and convert the exported folder with"
        " llama.cpp's convert_hf_to_gguf.py"
    )
