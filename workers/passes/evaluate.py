"""Perplexity of a model folder, layer by layer: no process ever holds the model.

Protocol: the text is tokenised as a whole and cut into windows; negative log-likelihoods are
natural logarithms, summed over predicted tokens; with overlapping windows only tokens no earlier
window predicted are counted. Letters: N windows, T tokens.
"""

from pathlib import Path

import torch
from torch import Tensor

from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network import layers
from rayprune.workers.network.micro_batch import MicroBatch, Store
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.sweep import embed_all


@torch.inference_mode()
def window_losses(
    model_path: Path,
    windows_NT: Tensor,
    first_index: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
    store: Store,
) -> list[tuple[float, int]]:
    """For each window the sum of negative log-likelihoods (nats) and the number of tokens in it.

    `first_index` is the number of the first of these windows in the whole text; the hidden states
    of at most `EVALUATED_AT_ONCE` windows wait where `store` puts them.
    """
    model = StreamedModel(open_checkpoint(model_path), dtype, device, store)
    return [
        loss
        for number, group_NT in enumerate(windows_NT.split(EVALUATED_AT_ONCE))
        for loss in _losses(model, group_NT, first_index + number * EVALUATED_AT_ONCE, stride)
    ]


def behind_layers(model: StreamedModel, windows_NT: Tensor) -> list[MicroBatch]:
    """Windows, each by itself, behind the last layer of an unchanged model."""
    batches = embed_all(model, list(windows_NT.split(1)))
    for index in range(model.checkpoint.num_layers):
        layer = model.load_layer(index)
        for batch in batches:
            layers.finish_layer(layer, index, batch, {})
    return batches


def num_scored(index: int, window: int, stride: int) -> int:
    """Tokens that are scored of a window, its last ones, by its number in the text: all but the
    first of the first one, of the others those that no earlier window has scored.
    """
    return window - 1 if index == 0 else min(stride, window - 1)


def _losses(
    model: StreamedModel, windows_NT: Tensor, first_index: int, stride: int
) -> list[tuple[float, int]]:
    """Those of windows that go through the layers together."""
    batches, losses = behind_layers(model, windows_NT), list[tuple[float, int]]()
    for number, (batch, tokens_1T) in enumerate(zip(batches, windows_NT.split(1), strict=True)):
        count = num_scored(first_index + number, windows_NT.shape[1], stride)
        logits = model.logits(tokens_1T, batch.hidden_BTD)[0, -count - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(
            logits, tokens_1T[0, -count:].to(logits.device), reduction="sum"
        )
        losses.append((float(loss), count))
    return losses
