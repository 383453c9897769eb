"""How close a model is to the one it was made from, window by window: both go through their layers
one at a time, and are compared in their next-token distributions.

Letters: N windows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.network import layers
from rayprune.workers.network.streamed import MicroBatch, StreamedModel
from rayprune.workers.passes.sweep import embed_all


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
def compared(original: StreamedModel, other: StreamedModel, windows_NT: Tensor) -> list[Compared]:
    """Every window under both models; every token but a window's first is predicted.

    Hidden states of at most `EVALUATED_AT_ONCE` windows of both wait. Numerics: logits as computed,
    differences in fp32, sums in fp64.
    """
    found: list[Compared] = []
    for group_NT in windows_NT.split(EVALUATED_AT_ONCE):
        windows = list(group_NT.split(1))
        ends = [_behind_all(model, windows) for model in (original, other)]
        found += [
            _compared(
                window_1T,
                _log_probabilities(original, window_1T, before),
                _log_probabilities(other, window_1T, after),
            )
            for window_1T, before, after in zip(windows, *ends, strict=True)
        ]
    return found


def _behind_all(model: StreamedModel, windows: Sequence[Tensor]) -> list[MicroBatch]:
    """Windows behind the last layer."""
    batches = embed_all(model, windows)
    for index in range(model.checkpoint.num_layers):
        layer = model.load_layer(index)
        for batch in batches:
            layers.finish_layer(layer, index, batch, {})
    return batches


def _log_probabilities(model: StreamedModel, window_1T: Tensor, batch: MicroBatch) -> Tensor:
    logits_TV = model.logits(window_1T, batch.hidden_BTD)[0, :-1]
    return torch.log_softmax(logits_TV.float(), dim=-1)


def _compared(window_1T: Tensor, log_p_TV: Tensor, log_q_TV: Tensor) -> Compared:
    targets_T1 = window_1T[0, 1:, None].to(log_p_TV.device)
    original_loss, loss = (
        -float(log_TV.gather(1, targets_T1).sum(dtype=torch.float64))
        for log_TV in (log_p_TV, log_q_TV)
    )
    divergence = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1, dtype=torch.float64).sum()
    agreed = (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).sum()
    return Compared(len(targets_T1), original_loss, loss, float(divergence), int(agreed))
