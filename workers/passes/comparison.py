"""How close a model is to the one it was made from, window by window: both go through their layers
one at a time, and are compared in their next-token distributions.

Letters: N windows, T tokens, B some of them, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.network.streamed import MicroBatch, StreamedModel
from rayprune.workers.passes.evaluate import behind_layers, num_scored

ROWS = 64
"""Tokens whose distributions are compared together: what that takes beside the distributions
themselves is small."""


@dataclass(frozen=True)
class Compared:
    """Sums over the predicted tokens of one window."""

    tokens: int
    original_loss: float
    """Negative log-likelihood under the original, in nats."""
    loss: float
    """Under the other model."""
    divergence: float
    """KL: sum p (log p - log q) over the vocabulary, p the original's, in nats."""
    agreed: int
    """Tokens for which both models expect the same one most; of equal ones the first counts."""


@torch.inference_mode()
def compared(
    original: StreamedModel, other: StreamedModel, windows_NT: Tensor, first_index: int, stride: int
) -> list[Compared]:
    """Every window under both models, in the tokens that are scored of it.

    `first_index` is the number of the first of these windows in the whole text. Hidden states of at
    most `EVALUATED_AT_ONCE` windows of both wait. Numerics: logits as computed, differences in
    fp32, sums in fp64.
    """
    found: list[Compared] = []
    for group_NT in windows_NT.split(EVALUATED_AT_ONCE):
        ends = [behind_layers(model, group_NT) for model in (original, other)]
        for window_1T, before, after in zip(group_NT.split(1), *ends, strict=True):
            count = num_scored(first_index + len(found), len(window_1T[0]), stride)
            found.append(
                _compared(
                    window_1T[0, -count:],
                    _log_probabilities(original, window_1T, before, count),
                    _log_probabilities(other, window_1T, after, count),
                )
            )
    return found


def _log_probabilities(
    model: StreamedModel, window_1T: Tensor, batch: MicroBatch, count: int
) -> Tensor:
    logits_TV = model.logits(window_1T, batch.hidden_BTD)[0, -count - 1 : -1]
    return torch.log_softmax(logits_TV.float(), dim=-1)


def _compared(targets_T: Tensor, log_p_TV: Tensor, log_q_TV: Tensor) -> Compared:
    targets_T1 = targets_T[:, None].to(log_p_TV.device)
    original_loss, loss = (
        -float(log_TV.gather(1, targets_T1).sum(dtype=torch.float64))
        for log_TV in (log_p_TV, log_q_TV)
    )
    divergence, agreed = 0.0, 0
    for log_p_BV, log_q_BV in zip(log_p_TV.split(ROWS), log_q_TV.split(ROWS), strict=True):
        each_B = (log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(-1, dtype=torch.float64)
        divergence += float(each_B.sum())
        agreed += int((log_p_BV.argmax(-1) == log_q_BV.argmax(-1)).sum())
    return Compared(len(targets_T1), original_loss, loss, divergence, agreed)
