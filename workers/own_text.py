"""Text that a model writes itself: calibration on it beside text of one domain keeps what the model
can do in others.

After Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning" (arXiv
2410.17170); of chats both sides, after Xu et al. 2024, "Magpie" (arXiv 2406.08464).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayprune.specs.errors import SpecError
from rayprune.specs.own_text import OWN_LENGTH, OwnTextSpec
from rayprune.specs.texts import TextSpec
from rayprune.workers.calibration import load_tokenizer, opening_of, tokenize
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.network.decoding import decode_by_products
from rayprune.workers.network.load_check import loaded
from rayprune.workers.network.sampling import Rules, sampled
from rayprune.workers.stock import stock_ends
from rayprune.workers.texts.checks import check_known
from rayprune.workers.texts.limits import check_positions, embedding_rows
from rayprune.workers.texts.own import (
    LOOP,
    PROMPT_EVERY,
    Turns,
    first_token,
    longest_prompt,
    pieces,
    repeated,
    turns_of,
    vllm_cached,
)
from rayprune.workers.texts.tokenizer import has_template


@dataclass(frozen=True)
class Written:
    """Some documents."""

    lines: tuple[str, ...]
    """JSON: the document's number, its text, and the tokens that the model has written."""
    tokens: int
    """Of the lines."""
    dropped: int
    """Documents that are loops, and in no line."""
    prompts: str
    """What they go on from, one of `OwnTextSpec.prompts`, never `auto`."""


@dataclass(frozen=True)
class Author:
    """A whole model that writes, on one device, or over all GPUs that this process sees."""

    checkpoint: Checkpoint
    spec: OwnTextSpec
    text: TextSpec
    """What prompts are pieces of."""
    dtype: torch.dtype
    device: torch.device

    def write(self, first: int, lengths: Sequence[int]) -> Written:
        """The documents `first`, `first` + 1, ... of so many tokens each, written together.

        Raises:
            ModelError: the model cannot be loaded, or its probabilities are not finite.
            SpecError: the prompts' text, or the chat template, will not do.
        """
        numbers = range(first, first + len(lengths))
        prompts = self._prompts(numbers)
        chances = [Random(f"{self.spec.seed}-{number}") for number in numbers]
        draws = [[chance.random() for _ in range(max(lengths))] for chance in chances]
        found_BL = self._sampled(
            torch.tensor(prompts), torch.tensor(draws, dtype=torch.float64), self._rules
        )
        lines, tokens = list[str](), 0
        for number, prompt, found_L, length in zip(
            numbers, prompts, found_BL, lengths, strict=True
        ):
            ids = found_L[:length].tolist()
            if repeated(ids) > LOOP:
                continue
            ids = prompt + ids if self._turns else ids
            text = self._tokenizer.decode(ids, skip_special_tokens=not self._turns)
            lines.append(json.dumps({"document": number, "text": text, "input_ids": ids}))
            tokens += len(ids)
        given = "calibration" if self.spec.prompts == "auto" else self.spec.prompts
        kind = "chat" if self._turns else given
        return Written(tuple(lines), tokens, len(lengths) - len(lines), kind)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.checkpoint.path)

    @cached_property
    def _sampled(self) -> Callable[..., Tensor]:
        """What goes on with prompts, the model loaded; `sampled` says how."""
        path = self.checkpoint.path
        if self.spec.engine == "vllm":
            from rayprune.workers.engines.vllm_author import VllmAuthor  # installed beside us

            per_token = self.checkpoint.model.cached_numbers * self.dtype.itemsize
            prompt = len(self._turns.before) if self._turns else longest_prompt(self.spec)
            length, batch = prompt + self.spec.length, self.spec.batch
            cache_bytes = vllm_cached(batch, length) * per_token
            return VllmAuthor(path, self.dtype, length, batch, cache_bytes).sampled
        on_gpu = self.device.type == "cuda"
        network = loaded(path, self.dtype, "auto" if on_gpu else None).eval()
        decode_by_products(network)
        return partial(sampled, network)

    @cached_property
    def _turns(self) -> Turns | None:
        wanted = self.spec.prompts
        if wanted == "chat" or (wanted == "auto" and has_template(self.checkpoint.path)):
            try:
                return turns_of(self._tokenizer, "calibration.own.prompts: chat")
            except SpecError:
                if wanted == "chat":
                    raise
        return None

    @cached_property
    def _rules(self) -> Rules:
        """None of the tokens that end a text follows, as far as the model has them."""
        ends = stock_ends(self.checkpoint.path) | {self._tokenizer.eos_token_id}
        known = range(self.checkpoint.model.vocabulary)
        never = sorted(end for end in ends if end in known)
        if self._turns is None:
            return Rules(self.spec.temperature, never)
        return Rules(self.spec.temperature, never, self._turns.behind, self._turns.ends)

    def _prompts(self, numbers: range) -> list[list[int]]:
        """What documents with these numbers go on from, all of one length."""
        rows, path = embedding_rows(self.checkpoint), str(self.checkpoint.path)
        if self._turns:
            before = self._turns.before
            check_positions(self.checkpoint, self.spec.length, OWN_LENGTH, len(before))
            check_known(torch.tensor([*before, *chain(*self._turns.behind)]), rows, path)
            return [list(before) for _ in numbers]
        opening = opening_of(self._tokenizer).before
        if self.spec.prompts == "none":
            first = list(opening or [first_token(self._tokenizer)])
            check_known(torch.tensor(first), rows, path)
            return [first for _ in numbers]
        asked = numbers.stop * PROMPT_EVERY
        ids_T = tokenize(self.text, self._tokenizer, asked)
        if len(ids_T) == 0:
            raise SpecError(
                f"{self.text.path}: holds no text to go on from; give another file, or none"
            )
        check_known(
            torch.cat([torch.tensor(opening, dtype=ids_T.dtype), ids_T]), rows, self.text.path
        )
        return pieces(ids_T.tolist(), numbers, asked, opening)
