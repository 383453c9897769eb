"""How much the loss feels each number that a consumer reads: squared gradients, layer by layer backwards.

No process holds the model: every layer is loaded on the way up and again on the way down, and the hidden states before each
wait where `keep` puts them. Letters: L layers, T tokens, D hidden, F width of a consumer's input.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers import layers
from workers.families import UnitGroup
from workers.layers import MicroBatch, Store, StreamedModel
from workers.sweep import embed_all

Squares = dict[str, Tensor]
"""By group, for every layer and number: squared gradients, summed over tokens, (L, F), fp64."""


def squared_gradients(model: StreamedModel, groups: Mapping[str, UnitGroup], windows: Sequence[Tensor], keep: Store) -> list[Squares]:
    """Of every window (1, T) of the dense model; the loss is the sum of the window's negative log-likelihoods (nats).

    Cost: about three forward passes; weights are read twice.
    """
    num_layers = model.checkpoint.num_layers
    batches, given = embed_all(model, windows), list[list[Tensor]]()
    for index in range(num_layers):
        layer = model.load_layer(index)
        given.append([keep(batch.hidden_BTD) for batch in batches])
        for batch in batches:
            layers.finish_layer(layer, index, batch, {})
    behind = [keep(model.loss_gradient(window, batch.hidden_BTD)) for window, batch in zip(windows, batches, strict=True)]
    found: list[list[Squares]] = [[] for _ in windows]
    for index in reversed(range(num_layers)):
        layer = model.load_layer(index, prefetch=False)
        for number, hidden_1TD in enumerate(given.pop()):
            batch = MicroBatch(hidden_1TD, batches[number].arguments)
            before_1TD, inputs = layers.backward(layer, index, batch, groups, behind[number].to(model.device))
            behind[number] = keep(before_1TD)
            found[number].append({name: g.flatten(0, -2).double().square().sum(0).cpu() for name, g in inputs.items()})
    return [{name: torch.stack([layer[name] for layer in reversed(by_layer)]) for name in groups} for by_layer in found]


def added(left: Squares, right: Squares) -> Squares:
    """The sums of two."""
    return {name: left[name] + right[name] for name in left}
