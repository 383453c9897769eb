"""A whole model writes: transformers computes, here it is chosen which token follows.

Letters: B documents, T tokens of a prompt, L tokens that are written, V vocabulary, N blocks of it,
W tokens of a block.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from rayprune.specs.errors import ModelError
from rayprune.workers.network.decoding import whole_cache

WIDTH = 256
"""Tokens of a block, whose probabilities are summed first."""


@dataclass(frozen=True)
class Rules:
    """By what tokens are chosen; of plain values, so that it goes into other processes."""

    temperature: float
    never: Collection[int]
    """Tokens that do not follow: those that end a text."""
    behind: tuple[Sequence[int], Sequence[int]] | None = None
    """The tokens that stand behind the turns of two speakers: where one of them ends, by the first
    `ends` of these or by one of `never`, they are written and the other one goes on.
    """
    ends: tuple[int, int] = (1, 1)

    @property
    def undrawn(self) -> list[int]:
        """Tokens that are not drawn; where two speak, all are."""
        return [] if self.behind else sorted(self.never)


@torch.inference_mode()
def sampled(network: Any, prompts_BT: Tensor, draws_BL: Tensor, rules: Rules) -> Tensor:
    """What a model goes on with behind prompts, (B, L) on the CPU: of every document one number in
    [0, 1) a token, `draws`, decides, on the CPU in fp64 but for the probabilities, which are fp32.

    So a document depends on the others that are written with it by the rounding of the model's own
    products alone.

    Raises:
        ModelError: a probability is not finite.
    """
    choose = _Choose(draws_BL, rules)
    network.generation_config = GenerationConfig()  # the folder's may cut the distribution
    found: Tensor = network.generate(
        prompts_BT.to(network.device),
        attention_mask=torch.ones_like(prompts_BT, device=network.device),
        max_new_tokens=draws_BL.shape[1],
        do_sample=False,
        pad_token_id=0,
        logits_processor=[choose],
        **whole_cache(network),
    )
    return found[:, prompts_BT.shape[1] :].cpu()


class Dialogue:
    """Whose turn it is in a document, if two speakers write it."""

    def __init__(self, rules: Rules) -> None:
        self._rules, self._never = rules, set(rules.never)
        self._speaker, self._left, self._said = 0, deque[int](), list[int]()

    def follows(self, token: int) -> int:
        """The token that is written where this one is drawn."""
        if not self._rules.behind:
            return token
        if not self._left:
            behind, count = self._rules.behind[self._speaker], self._rules.ends[self._speaker]
            begun = _begun(self._said, behind[: count - 1])
            if token in self._never or (begun == count - 1 and token == behind[begun]):
                self._left.extend(behind[begun:])
            self._said = [*self._said, token][-count:]
            if self._left:
                self._speaker, self._said = 1 - self._speaker, []
        return self._left.popleft() if self._left else token


def _begun(said: Sequence[int], wanted: Sequence[int]) -> int:
    """How many of the first tokens that are wanted were said last."""
    counts = range(min(len(said), len(wanted)), 0, -1)
    return next((n for n in counts if list(said[-n:]) == list(wanted[:n])), 0)


class _Choose:
    """Leaves of every document's scores one token, which the search for the best then takes."""

    def __init__(self, draws_BL: Tensor, rules: Rules) -> None:
        self._draws_BL, self._rules, self._step = draws_BL, rules, 0
        self._dialogues = [Dialogue(rules) for _ in draws_BL]

    def __call__(self, _: Tensor, scores_BV: Tensor) -> Tensor:
        drawn_B = chosen(scores_BV, self._draws_BL[:, self._step], self._rules)
        self._step += 1
        chosen_B = torch.tensor(
            [
                dialogue.follows(int(token))
                for dialogue, token in zip(self._dialogues, drawn_B, strict=True)
            ]
        )
        one_hot_BV = torch.full_like(scores_BV, -torch.inf)
        return one_hot_BV.scatter_(1, chosen_B[:, None].to(scores_BV.device), 0.0)


def chosen(scores_BV: Tensor, draws_B: Tensor, rules: Rules) -> Tensor:
    """The tokens (B,) that numbers in [0, 1), `draws`, choose by a model's scores.

    Raises:
        ModelError: a probability is not finite.
    """
    logits_BV = scores_BV.float() / rules.temperature
    logits_BV[:, rules.undrawn] = -torch.inf
    return drawn(torch.softmax(logits_BV, -1), draws_B)


def drawn(p_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The tokens (B,) at which the sums of probabilities pass the numbers in [0, 1), `draws`, fp64,
    on the CPU: the inverse of the distribution function.

    Sums of blocks first, so that little leaves a GPU, and no sum depends on how it is spread there.

    Raises:
        ModelError: a probability is not finite.
    """
    padded_BV = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[1] % WIDTH))
    p_BNW = padded_BV.unflatten(1, (-1, WIDTH))
    mass_BN = p_BNW.sum(-1, dtype=torch.float64).cpu()
    if not mass_BN.isfinite().all():
        raise ModelError(
            "a model that writes text: its probabilities are not finite; set model.dtype: float32"
        )
    block_B, rest_B = _passed(mass_BN, draws_B * mass_BN.sum(1))
    p_BW = p_BNW[torch.arange(len(p_BNW)), block_B.to(p_BNW.device)].double().cpu()
    return block_B * WIDTH + _passed(p_BW, rest_B)[0]


def _passed(mass_BN: Tensor, wanted_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where sums of masses pass what is wanted, always at one above 0, and what is wanted there."""
    sums_BN = mass_BN.cumsum(1)
    wanted_B = torch.minimum(wanted_B, sums_BN[:, -1] * (1 - 1e-12))
    place_B = torch.searchsorted(sums_BN, wanted_B[:, None], right=True)[:, 0]
    before_B = (sums_BN - mass_BN).gather(1, place_B[:, None])[:, 0]
    return place_B, (wanted_B - before_B).clamp(min=0.0)
