"""What a pruned encoder has kept, layer by layer: how alike its embeddings of texts are to the
dense model's, and how well it predicts tokens that are masked.

Protocol: the embedding of a window is the mean of the hidden states behind the last norm over all
its tokens, special ones included (mean pooling, as sentence-transformers have it, without
padding). Of two models the cosine of each window's embeddings is taken, in fp64. Negative
log-likelihoods are natural logarithms, summed over masked tokens, given windows in which all of
these are masked at the same time. Letters: N windows, T tokens, D hidden.
"""

from pathlib import Path

import torch
from torch import Tensor

from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.micro_batch import Store
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.evaluate import behind_layers


@torch.inference_mode()
def embeddings(
    model_path: Path, windows_NT: Tensor, dtype: torch.dtype, device: torch.device, store: Store
) -> Tensor:
    """Embeddings of windows (N, D), fp64; the hidden states of at most `EVALUATED_AT_ONCE` of them
    wait where `store` puts them.
    """
    model = StreamedModel(open_checkpoint(model_path), dtype, device, store)
    found = []
    for group_NT in windows_NT.split(EVALUATED_AT_ONCE):
        batches = behind_layers(model, group_NT)
        for batch, tokens_1T in zip(batches, group_NT.split(1), strict=True):
            hidden_TD = model.last_hidden(tokens_1T, batch.hidden_BTD)[0]
            found.append(hidden_TD.mean(0, dtype=torch.float64).cpu())
    return torch.stack(found)


def cosines(first_ND: Tensor, second_ND: Tensor) -> list[float]:
    """The cosine of each row of one with that of the other; of a row of zeros 0."""
    cosine_N: Tensor = torch.nn.functional.cosine_similarity(first_ND, second_ND)
    return cosine_N.tolist()


@torch.inference_mode()
def masked_losses(
    model_path: Path,
    windows_NT: Tensor,
    masked_NT: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    store: Store,
) -> list[tuple[float, int]]:
    """For each window the sum of negative log-likelihoods (nats) of what is masked, and how many
    tokens that is.

    `masked` are the windows as the model reads them: tokens that differ from the windows' own are
    predicted.
    """
    model = StreamedModel(open_checkpoint(model_path), dtype, device, store)
    losses = []
    for group_NT, read_NT in zip(
        windows_NT.split(EVALUATED_AT_ONCE), masked_NT.split(EVALUATED_AT_ONCE), strict=True
    ):
        batches = behind_layers(model, read_NT)
        for batch, tokens_T, read_T in zip(batches, group_NT, read_NT, strict=True):
            logits_TV = model.logits(read_T[None], batch.hidden_BTD)[0]
            hidden = (tokens_T != read_T).nonzero().flatten()
            loss = torch.nn.functional.cross_entropy(
                logits_TV[hidden.to(logits_TV.device)].float(),
                tokens_T[hidden].to(logits_TV.device),
                reduction="sum",
            )
            losses.append((float(loss), len(hidden)))
    return losses
