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
    """Behind what a user says, and behind an answer, so that the other one goes on. Its first token
    is how a speaker ends.
    """


def turns_of(tokenizer: "PreTrainedTokenizerBase", where: str) -> Turns:
    """What the model's chat template puts before, between and behind turns.

    Raises:
        SpecError: there is no template, or it does not write down what is said.
    """
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, _SAID, strict=True)]
    text, parts = rendered(messages, tokenizer, where), list[str]()
    for word in _SAID:
        part, found, text = text.partition(word)
        parts.append(part if found else "")
    ids = [tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
    if not all(ids):
        raise SpecError(
            f"{where}: the model's chat template does not put something before every turn; set"
            " calibration.own.prompts to calibration or none"
        )
    return Turns(ids[0], (ids[1], ids[2]))


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


def pieces(ids: Sequence[int], numbers: range, asked: int) -> list[list[int]]:
    """The prompts of documents with these numbers, from a text's first tokens: `asked` of them, or
    all that it has, and then it begins anew.
    """
    around = max(1, len(ids) - PROMPT + 1) if len(ids) < asked else asked
    starts = [number * PROMPT_EVERY % around for number in numbers]
    return [list(ids[start : start + PROMPT]) for start in starts]


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
