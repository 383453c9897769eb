"""How close a model is to the one it was made from, window by window: both go through their layers
one at a time, and are compared in their next-token distributions.

Letters: N windows, T tokens, B some of them, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.evaluate import behind_layers, num_scored

ROWS = 64
"""Tokens whose distributions are compared together: what that takes beside the distributions
themselves is small."""
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
"""Slices by the place in the window at which a token stands."""
RARE, OTHERS = "rare tokens", "other tokens"
RARE_PART = 0.1
"""Rare are the rarest tokens of a text that make up so much of it."""


@dataclass(frozen=True)
class Sums:
    """Sums over some predicted tokens."""

    tokens: int
    original_loss: float
    """Negative log-likelihood under the original, in nats."""
    loss: float
    """Under the other model."""
    divergence: float
    """KL: sum p (log p - log q) over the vocabulary, p the original's, in nats."""
    agreed: int
    """Tokens for which both models expect the same one most; of equal ones the first counts."""


@dataclass(frozen=True)
class Compared(Sums):
    """All predicted tokens of one window, and some of them apart."""

    slices: Mapping[str, Sums] = field(default_factory=dict)


@dataclass(frozen=True)
class Texts:
    """Windows of several texts, one text behind the other."""

    windows_NT: Tensor
    starts: Sequence[int] = (0,)
    """Where each text begins, in order, the first with 0."""
    stride: int = 1
    """Tokens between the starts of two windows of a text."""

    def text_of(self, window: int) -> int:
        """The number of the text that a window belongs to."""
        return bisect_right(self.starts, window) - 1

    def scored(self, window: int) -> int:
        """Tokens that are scored of a window, its last ones."""
        within = window - self.starts[self.text_of(window)]
        return num_scored(within, self.windows_NT.shape[1], self.stride)

    def rare(self, text: int) -> Tensor:
        """Tokens of a text that occur at most so often in it, for the least such number with which
        they are `RARE_PART` of it.
        """
        ends = [*self.starts[1:], len(self.windows_NT)]
        windows_NT = self.windows_NT[self.starts[text] : ends[text]]
        # of windows that overlap what is new in each
        ids_T = torch.cat([windows_NT[0], windows_NT[1:, -self.stride :].flatten()])
        ids, counts = torch.unique(ids_T, return_counts=True)
        by_count = torch.bincount(counts, weights=counts.double()).cumsum(0)
        most = int((by_count >= RARE_PART * len(ids_T)).nonzero()[0])
        rare: Tensor = ids[counts <= most]
        return rare


@torch.inference_mode()
def compared(
    original: StreamedModel, other: StreamedModel, texts: Texts, owned: range
) -> list[Compared]:
    """Some windows under both models, in the tokens that are scored of them.

    Hidden states of at most `EVALUATED_AT_ONCE` windows of both wait. Numerics: logits as computed,
    differences in fp32, sums in fp64.
    """
    found: list[Compared] = []
    windows_NT = texts.windows_NT[owned.start : owned.stop].clone()
    rare = {text: texts.rare(text) for text in sorted({texts.text_of(n) for n in owned})}
    for group_NT in windows_NT.split(EVALUATED_AT_ONCE):
        ends = [behind_layers(model, group_NT) for model in (original, other)]
        for window_1T, before, after in zip(group_NT.split(1), *ends, strict=True):
            number = owned[len(found)]
            count = texts.scored(number)
            log_p_TV = _log_probabilities(original, window_1T, before, count)
            log_q_TV = _log_probabilities(other, window_1T, after, count)
            each = _each(window_1T[0, -count:], log_p_TV, log_q_TV)
            slices = dict(_slices(window_1T[0], count, rare[texts.text_of(number)]))
            parts = {name: each.sums(chosen_T) for name, chosen_T in slices.items()}
            found.append(Compared(**vars(each.sums()), slices=parts))
    return found


def _log_probabilities(
    model: StreamedModel, window_1T: Tensor, batch: MicroBatch, count: int
) -> Tensor:
    logits_TV = model.logits(window_1T, batch.hidden_BTD)[0, -count - 1 : -1]
    return torch.log_softmax(logits_TV.float(), dim=-1)


@dataclass(frozen=True)
class _Each:
    """Of every predicted token, on the CPU."""

    original_loss_T: Tensor
    loss_T: Tensor
    divergence_T: Tensor
    agreed_T: Tensor

    def sums(self, chosen_T: Tensor | None = None) -> Sums:
        """Over all of them, or some."""
        original_T, loss_T, divergence_T, agreed_T = (
            each_T if chosen_T is None else each_T[chosen_T] for each_T in vars(self).values()
        )
        return Sums(
            tokens=len(loss_T),
            original_loss=float(original_T.sum(dtype=torch.float64)),
            loss=float(loss_T.sum(dtype=torch.float64)),
            divergence=sum(float(block_B.sum()) for block_B in divergence_T.split(ROWS)),
            agreed=int(agreed_T.sum()),
        )


def _each(targets_T: Tensor, log_p_TV: Tensor, log_q_TV: Tensor) -> _Each:
    targets_T1 = targets_T[:, None].to(log_p_TV.device)
    original_loss_T, loss_T = (
        -log_TV.gather(1, targets_T1)[:, 0].cpu() for log_TV in (log_p_TV, log_q_TV)
    )
    blocks = list(zip(log_p_TV.split(ROWS), log_q_TV.split(ROWS), strict=True))
    divergence_T = torch.cat(
        [(p_BV.exp() * (p_BV - q_BV)).sum(-1, dtype=torch.float64) for p_BV, q_BV in blocks]
    )
    agreed_T = torch.cat([p_BV.argmax(-1) == q_BV.argmax(-1) for p_BV, q_BV in blocks])
    return _Each(original_loss_T, loss_T, divergence_T.cpu(), agreed_T.cpu())


def _slices(window_T: Tensor, count: int, rare: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Which of the last `count` tokens of a window are in a slice; slices without any are left
    out.
    """
    length = len(window_T)
    quarter_T = torch.arange(length - count, length) * len(QUARTERS) // length
    is_rare_T = torch.isin(window_T[-count:], rare)
    chosen = {name: quarter_T == number for number, name in enumerate(QUARTERS)}
    for name, chosen_T in (chosen | {RARE: is_rare_T, OTHERS: ~is_rare_T}).items():
        if chosen_T.any():
            yield name, chosen_T
