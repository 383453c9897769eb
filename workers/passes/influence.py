"""How much every layer turns the hidden states: ShortGPT's Block Influence (arXiv 2403.03853).

Letters: B windows of a micro-batch, T tokens, D hidden, L layers, N windows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayprune.workers.network.layers import finish_layer
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.sweep import embed_all


@torch.inference_mode()
def influences(model: StreamedModel, windows: Sequence[Tensor]) -> list[list[float]]:
    """Of every window (1, T) and layer of the dense model the sum over the tokens of 1 - cos(x, y),
    x and y the hidden states (D) before and behind the layer: equation 1 of the paper, times T.

    Numerics: cosines in fp64. Cost: one forward pass.
    """
    batches, found = embed_all(model, windows), [list[float]() for _ in windows]
    for index in range(model.checkpoint.num_layers):
        layer = model.load_layer(index)
        for batch, sums in zip(batches, found, strict=True):
            before_TD = batch.hidden_BTD.flatten(0, 1).double()
            finish_layer(layer, index, batch, {})
            behind_TD = batch.hidden_BTD.flatten(0, 1).double()
            sums.append(float((1 - torch.cosine_similarity(before_TD, behind_TD, -1)).sum()))
    return found
