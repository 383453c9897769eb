"""How far the outputs of pruned models lie from the dense model's: many models at once, each layer
loaded once.

Models that agree in their first layers share these layers' hidden states. Letters: T tokens, D
hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rayprune.workers.model.description import Layer, Model
from rayprune.workers.network import layers
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.sweep import embed_all

Kept = Mapping[str, int] | None
"""Units that stay, by group; a group that is left out stays whole. None: the layer is left out."""
Choice = tuple[tuple[str, int], ...]
"""The groups of a layer that lose units, and how many stay."""
_LEFT_OUT: Choice = (("the layer", 0),)
_Cuts = dict[tuple[str, int], dict[str, Cut]]
"""By group and how many units stay: of experts the cut of each."""


@torch.inference_mode()
def divergences(
    model: StreamedModel,
    windows: Sequence[Tensor],
    candidates: Sequence[Sequence[Kept]],
    cut: Callable[[int, str, int], Cut],
) -> list[list[float]]:
    """For each candidate and window the KL divergence (nats, summed over the window's tokens) of
    its next-token distribution; of an encoder the squared relative distance of its last hidden
    states, |h - h'|^2 / |h|^2, summed likewise.

    A candidate says for every layer what stays; `cut` gives the cut of a layer's group, of experts
    that of one of them, for so many units. From the dense model's distribution: sum p (log p - log
    q). Numerics: logits and hidden states as computed, differences in fp32, sums in fp64.
    """
    output, divergence = (
        (_log_probabilities, _divergence)
        if model.checkpoint.model.causal
        else (_last_hidden, _distance)
    )
    described = model.checkpoint.model
    choices = [
        [_choice(described, *each) for each in zip(described.layers, candidate, strict=True)]
        for candidate in candidates
    ]
    dense: tuple[Choice, ...] = ()
    states: dict[tuple[Choice, ...], list[MicroBatch]] = {dense: embed_all(model, windows)}
    for index, layer in enumerate(described.layers):
        module, cuts = model.load_layer(index), _Cuts()
        prefixes = sorted(
            {tuple(candidate[: index + 1]) for candidate in choices} | {((),) * (index + 1)}
        )
        chosen = {prefix[-1] for prefix in prefixes} - {_LEFT_OUT}
        for name, count in {item for choice in chosen for item in choice}:
            members = layer.group(name).members
            cuts[name, count] = {each.name: cut(index, each.name, count) for each in members}
        built = {choice: _built(model, module, index, choice, cuts) for choice in chosen}
        states = {
            prefix: [
                _behind(built.get(prefix[-1], module), index, batch, layer, prefix[-1], cuts)
                for batch in states[prefix[:-1]]
            ]
            for prefix in prefixes
        }
    ends = [tuple(candidate) for candidate in choices]
    dense = ((),) * model.checkpoint.num_layers
    totals: dict[tuple[Choice, ...], list[float]] = {end: [] for end in ends}
    for number, window in enumerate(windows):
        of_dense = output(model, window, states[dense][number])
        for end, found in totals.items():
            found.append(
                divergence(of_dense, output(model, window, states[end][number]))
                if end != dense
                else 0.0
            )
    return [totals[end] for end in ends]


def _choice(model: Model, layer: Layer, kept: Kept) -> Choice:
    if kept is None:
        return _LEFT_OUT
    stay = model.followed(kept)
    return tuple(
        (group.name, stay[group.name])
        for group in layer.groups
        if stay.get(group.name, group.num_units) < group.num_units
    )


def _built(
    model: StreamedModel, module: nn.Module, index: int, choice: Choice, cuts: _Cuts
) -> nn.Module:
    """The layer, with the experts alone that stay by a choice."""
    for item in choice:
        if (cut := cuts[item].get("experts")) is not None:
            return model.with_experts(index, module, cut.units.tolist())
    return module


def _behind(
    module: nn.Module, index: int, batch: MicroBatch, layer: Layer, choice: Choice, cuts: _Cuts
) -> MicroBatch:
    """A copy of a micro-batch, behind a layer of which so many units stay."""
    result = batch.parted()
    if choice == _LEFT_OUT:
        return result
    for name, count in choice:
        found, group = cuts[name, count], layer.group(name)
        if group.count > 1:
            layers.apply_expert_cuts(module, index, result, layer.members, found)
        elif group.kind != "experts":
            layers.apply_cut(module, index, result, layer.members, name, found[name])
    layers.finish_layer(module, index, result, layer.members)
    return result


def _log_probabilities(model: StreamedModel, tokens_1T: Tensor, batch: MicroBatch) -> Tensor:
    return torch.log_softmax(model.logits(tokens_1T, batch.hidden_BTD)[0].float(), dim=-1)


def _divergence(log_p_TV: Tensor, log_q_TV: Tensor) -> float:
    return float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1, dtype=torch.float64).sum())


def _last_hidden(model: StreamedModel, tokens_1T: Tensor, batch: MicroBatch) -> Tensor:
    return model.last_hidden(tokens_1T, batch.hidden_BTD)[0].float()


def _distance(dense_TD: Tensor, pruned_TD: Tensor) -> float:
    lost_T = (dense_TD - pruned_TD).square().sum(-1) / dense_TD.square().sum(-1)
    return float(lost_T.sum(dtype=torch.float64))
