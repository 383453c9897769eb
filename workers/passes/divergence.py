"""How far the outputs of pruned models lie from the dense model's: many models at once, each layer
loaded once.

Models that agree in their first layers share these layers' hidden states. Letters: T tokens, D
hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rayprune.workers.model.description import Group
from rayprune.workers.network import layers
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import MicroBatch, StreamedModel
from rayprune.workers.passes.sweep import embed_all

Kept = Mapping[str, int] | None
"""Units that stay, by group; a group that is left out stays whole. None: the layer is left out."""
Choice = tuple[tuple[str, int], ...]
"""The groups of a layer that lose units, and how many stay."""
_LEFT_OUT: Choice = (("the layer", 0),)


@torch.inference_mode()
def divergences(
    model: StreamedModel,
    groups: Mapping[str, Group],
    windows: Sequence[Tensor],
    candidates: Sequence[Sequence[Kept]],
    cut: Callable[[int, str, int], Cut],
) -> list[list[float]]:
    """For each candidate and window the KL divergence (nats, summed over the window's tokens) of
    its next-token distribution; of an encoder the squared relative distance of its last hidden
    states, |h - h'|^2 / |h|^2, summed likewise.

    A candidate says for every layer what stays; `cut` gives the cut of a layer's group for so many
    units. From the dense model's distribution: sum p (log p - log q). Numerics: logits and hidden
    states as computed, differences in fp32, sums in fp64.
    """
    output, divergence = (
        (_log_probabilities, _divergence)
        if model.checkpoint.model.causal
        else (_last_hidden, _distance)
    )
    choices = [[_choice(groups, kept) for kept in candidate] for candidate in candidates]
    dense: tuple[Choice, ...] = ()
    states: dict[tuple[Choice, ...], list[MicroBatch]] = {dense: embed_all(model, windows)}
    for index in range(model.checkpoint.num_layers):
        module, cuts = model.load_layer(index), dict[tuple[str, int], Cut]()
        prefixes = sorted(
            {tuple(candidate[: index + 1]) for candidate in choices} | {((),) * (index + 1)}
        )
        chosen = {prefix[-1] for prefix in prefixes} - {_LEFT_OUT}
        for name, count in {item for choice in chosen for item in choice}:
            cuts[name, count] = cut(index, name, count)
        states = {
            prefix: [
                _behind(module, index, batch, groups, prefix[-1], cuts)
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


def _choice(groups: Mapping[str, Group], kept: Kept) -> Choice:
    if kept is None:
        return _LEFT_OUT
    return tuple(
        (name, kept[name])
        for name, group in groups.items()
        if kept.get(name, group.num_units) < group.num_units
    )


def _behind(
    module: nn.Module,
    index: int,
    batch: MicroBatch,
    groups: Mapping[str, Group],
    choice: Choice,
    cuts: Mapping[tuple[str, int], Cut],
) -> MicroBatch:
    """A copy of a micro-batch, behind a layer of which so many units stay."""
    result = MicroBatch(batch.hidden_BTD, batch.arguments, store=batch.store)
    if choice == _LEFT_OUT:
        return result
    for item in choice:
        layers.apply_cut(module, index, result, groups, item[0], cuts[item])
    layers.finish_layer(module, index, result, groups)
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
