"""How much the loss feels each number that a consumer reads: squared gradients, layer by layer
backwards.

No process holds the model: every layer is loaded on the way up and again on the way down, and the
hidden states before each wait in one file. Letters: L layers, N windows, T tokens, D hidden, F
width of a consumer's input.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.machine.memory import give_back_free_memory
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.model.description import Group
from rayprune.workers.network import layers
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.sweep import embed_all

Squares = dict[str, Tensor]
"""By group, for every layer and number: squared gradients, summed over tokens, (L, F), fp64; 0 in
layers without the group."""


def squared_gradients(
    model: StreamedModel,
    groups: Mapping[str, Group],
    windows: Sequence[Tensor],
    first: int,
    scratch: Scratch,
) -> list[Squares]:
    """Of every window (1, T) of the dense model; `first` is the number of the first one, the seed
    of what is drawn for it.

    The loss is the sum of negative log-likelihoods (nats) of tokens that are drawn from the model's
    own predictions: so the squares are the diagonal of its Fisher matrix, not of the text's. Cost:
    about three forward passes; weights are read twice.

    Raises:
        ModelError: predictions are not finite.
    """
    num_layers, batches = model.checkpoint.num_layers, embed_all(model, windows)
    shape = (len(windows), *batches[0].hidden_BTD.shape[1:])
    given_LNTD, behind_NTD = (
        scratch.empty(*dims, dtype=model.dtype) for dims in ((num_layers, *shape), shape)
    )
    for index in range(num_layers):
        layer = model.load_layer(index)
        for number, batch in enumerate(batches):
            given_LNTD[index, number] = batch.hidden_BTD[0]
            layers.finish_layer(layer, index, batch, {})
    for number, (window, batch) in enumerate(zip(windows, batches, strict=True)):
        behind_NTD[number] = _behind_last(model, window, batch.hidden_BTD, first + number)[0]
    found: list[list[Squares]] = [[] for _ in windows]
    lacking = model.checkpoint.model.lacking
    for index in reversed(range(num_layers)):
        layer = model.load_layer(index, prefetch=False)
        its = {name: g for name, g in groups.items() if index not in lacking.get(name, ())}
        for number, batch in enumerate(batches):
            batch.hidden_BTD = given_LNTD[index, number : number + 1]
            before_1TD, inputs = layers.backward(
                layer, index, batch, its, behind_NTD[number : number + 1].to(model.device)
            )
            behind_NTD[number] = before_1TD[0]
            found[number].append(
                {
                    name: g.flatten(0, -2).double().square().sum(0).cpu()
                    for name, g in inputs.items()
                }
            )
        give_back_free_memory()  # a layer leaves tens of MiB of holes
    none = {name: torch.zeros(group.width, dtype=torch.float64) for name, group in groups.items()}
    return [
        {
            name: torch.stack([(none | layer)[name] for layer in reversed(by_layer)])
            for name in groups
        }
        for by_layer in found
    ]


def _behind_last(model: StreamedModel, window_1T: Tensor, hidden_1TD: Tensor, seed: int) -> Tensor:
    """The loss's gradient with respect to what the last layer returns.

    Raises:
        ModelError: the predictions are not finite.
    """
    given_1TD = hidden_1TD.to(model.device, copy=True).requires_grad_()
    log_p_TV = torch.log_softmax(model.logits(window_1T, given_1TD)[0].float(), -1)
    if log_p_TV.isnan().any():
        raise ModelError(
            f"{model.checkpoint.path}: its predictions are not finite; {model.not_finite}"
        )
    # alike on any device
    drawn_T1 = torch.multinomial(
        log_p_TV.detach().exp().cpu(), 1, generator=torch.Generator().manual_seed(seed)
    )
    return torch.autograd.grad(-log_p_TV.gather(1, drawn_T1.to(model.device)).sum(), given_1TD)[0]


def added(left: Squares, right: Squares) -> Squares:
    """The sums of two."""
    return {name: left[name] + right[name] for name in left}
