"""What a model that writes text goes on from, and which of its documents are no text. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.own_text import OwnTextSpec
from rayprune.workers.texts.chats import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = 32
"""Tokens of a prompt that is a piece of a text."""
PROMPT_EVERY = 256
"""Tokens from the beginning of one such piece to that of the next."""
BLOCK = 128
"""Tokens of a block of vLLM's cache, at most; each document begins one."""
SPAN, LOOP = 8, 0.3
"""A document is a loop if more than this part of its spans of so many tokens stand in it before."""
_SAID = ("Questionword", "Answerword", "Nextword")


@dataclass(frozen=True)
class Turns:
    """How the chat template goes around what is said, as token ids."""

    before: tuple[int, ...]
    """Before a user's first word."""
    behind: tuple[tuple[int, ...], tuple[int, ...]]
    """Behind what a user says, and behind an answer, so that the other one goes on."""
    ends: tuple[int, int]
    """So many of the first of these tokens are how a speaker ends: up to the first one that stands
    for nothing else, or all of them.
    """


def turns_of(tokenizer: "PreTrainedTokenizerBase", where: str) -> Turns:
    """What the model's chat template puts before, between and behind turns: as tokens of a whole
    chat, since a piece by itself may have others.

    Raises:
        SpecError: there is no template, or no tokens of a whole chat are what stands around turns.
    """
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, _SAID, strict=True)]
    text = rendered(messages, tokenizer, where)
    remedy = "set calibration.own.prompts to calibration or none"
    if not tokenizer.is_fast:
        raise SpecError(
            f"{where}: the tokenizer does not tell which characters are which; {remedy}"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    parts = _between(found["input_ids"], found["offset_mapping"], text)
    if parts is None or not all(parts):
        raise SpecError(
            f"{where}: the model's chat template does not put something before every turn; {remedy}"
        )
    before, *behind = map(tuple, parts)
    added = tokenizer.added_tokens_decoder.items()  # some have runs of newlines among them
    single = {token for token, added in added if added.special or added.content.strip()}
    single |= set(tokenizer.all_special_ids)
    ends = [
        next((place for place, token in enumerate(ids, 1) if token in single), len(ids))
        for ids in behind
    ]
    return Turns(before, (behind[0], behind[1]), (ends[0], ends[1]))


def _between(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str
) -> list[list[int]] | None:
    """Tokens before each of the words that are said; a blank in front may be part of a word's
    token. None: a word is not there, or not made of tokens of its own.
    """
    parts, behind = [], 0
    for word in _SAID:
        first = text.find(word, behind)
        last = first + len(word)
        inside = [number for number, (a, b) in enumerate(offsets) if a < last and b > first]
        if first < 0 or not inside:
            return None
        begin, end = offsets[inside[0]][0], offsets[inside[-1]][1]
        if text[begin:first].strip() or end > last:
            return None
        parts.append(
            [t for t, (a, b) in zip(ids, offsets, strict=True) if behind <= a and b <= begin]
        )
        behind = last
    return parts


def first_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What a text begins with that goes on from nothing.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    found: Any = tokenizer.bos_token_id
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has no first token; give prompts"
            " (calibration.own.prompts: calibration, --prompts)"
        )
    return int(found)


def pieces(
    ids: Sequence[int], numbers: range, asked: int, opening: Sequence[int] = ()
) -> list[list[int]]:
    """The prompts of documents with these numbers, from a text's first tokens: `asked` of them, or
    all that it has, and then it begins anew. Each begins with `opening`, in place of its own first
    tokens.
    """
    around = max(1, len(ids) - PROMPT + 1) if len(ids) < asked else asked
    starts = [number * PROMPT_EVERY % around for number in numbers]
    first = len(opening)
    return [[*opening, *ids[start + first : start + PROMPT]] for start in starts]


def longest_prompt(own: OwnTextSpec) -> int:
    """Tokens of a prompt, as far as it is known without the chat template, which may take more."""
    return 1 if own.prompts == "none" else PROMPT


def vllm_cached(documents: int, length: int) -> int:
    """Tokens that vLLM's cache has room for, with so many documents of so many tokens, prompts
    among them; one block is its own.
    """
    return (documents * math.ceil(length / BLOCK) + 1) * BLOCK


def repeated(ids: Sequence[int]) -> float:
    """The part of a document's spans of `SPAN` tokens that stand in it before; 0 where it has
    none.
    """
    spans = [tuple(ids[start : start + SPAN]) for start in range(len(ids) - SPAN + 1)]
    return 1 - len(set(spans)) / len(spans) if spans else 0.0
