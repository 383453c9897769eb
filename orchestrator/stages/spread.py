"""The budget spread over the layers: pure arithmetic on predicted losses, scores and exact sizes.

A spread says for every layer how many units of each coupled group stay.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from typing import Any

import numpy as np

from rayprune.orchestrator.planning.footprint import (
    Footprint,
    footprint,
    footprint_sum,
    layer_footprint,
    limits,
)
from rayprune.orchestrator.planning.rounding import unit_steps
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.workers.model.checkpoint import Checkpoint

Kept = dict[str, int]
Spread = list[Kept]
Losses = Sequence[Mapping[str, Mapping[int, float]]]
"""For every layer and group, the predicted loss by number of units that stay; of all units, 0."""
Moved = tuple[int, str, int]
"""A layer, a group, and the units that stay of it from then on."""


@dataclass
class Budget:
    """What a model may take, and what each layer takes for what it keeps."""

    job: JobSpec
    checkpoint: Checkpoint
    least: float = 0.0
    """Decoder parameters that a layer of the mean size loses, at least."""
    most: float = math.inf
    """Decoder parameters that a layer of the mean size may lose."""
    _sizes: dict[tuple[int, tuple[tuple[str, int], ...]], Footprint] = field(default_factory=dict)

    @cached_property
    def steps(self) -> dict[str, int]:
        """Of what the number of units that stay is a multiple, by group."""
        return unit_steps(self.job, self.checkpoint.model)

    @property
    def channels(self) -> list[str]:
        """The groups that are FFNs."""
        return self.checkpoint.model.names_of("ffn")

    @property
    def some_stay(self) -> list[str]:
        """Groups of which every layer keeps at least one unit."""
        return [group.name for group in self.checkpoint.model.groups if group.some_stay]

    def layer(self, number: int, kept: Mapping[str, int]) -> Footprint:
        """Size of one layer."""
        model = self.checkpoint.model
        first = model.first_alike[number]
        key = first, tuple(sorted(kept.items()))
        if key not in self._sizes:
            whole = model.followed(kept)
            self._sizes[key] = layer_footprint(self.checkpoint, whole, self.job, layer=first)
        return self._sizes[key]

    def size(self, spread: Spread) -> Footprint:
        """Size of the whole model."""
        around = footprint(self.checkpoint, [], self.job)
        return footprint_sum([around, *starmap(self.layer, enumerate(spread))])

    def excess(self, size: Footprint) -> float:
        """By what fraction a model exceeds its targets, summed over them; 0: it meets them."""
        allowed = limits(self.job.budget, self.checkpoint.decoder_parameters)
        return math.fsum(
            max(0.0, getattr(size, name) / limit - 1) for name, limit in allowed.items()
        )

    def lost(self, number: int, kept: Mapping[str, int]) -> int:
        """Parameters that a layer has lost."""
        return self._dense(number) - self.layer(number, kept).decoder_parameters

    def loses_enough(self, number: int, kept: Mapping[str, int]) -> bool:
        """Whether a layer has lost the least that each loses."""
        return self.lost(number, kept) >= self.least * self._over_mean(number)

    def may_lose(self, number: int, kept: Mapping[str, int]) -> bool:
        """Whether a layer may lose so much."""
        return self.lost(number, kept) <= self.most * self._over_mean(number)

    def most_with(self, group: str) -> float:
        """Decoder parameters that a layer with a group, or one that follows it, may lose, of such
        layers the largest.
        """
        model = self.checkpoint.model
        firsts = [layer for layer in set(model.first_alike) if model.led_by(group, layer)]
        return self.most * max(map(self._over_mean, firsts))

    def _dense(self, number: int) -> int:
        return self.layer(number, self.checkpoint.model.units).decoder_parameters

    def _over_mean(self, number: int) -> float:
        """A layer's size over the mean of all."""
        whole = self.checkpoint.decoder_parameters
        return self._dense(number) * self.checkpoint.num_layers / whole

    def moved(self, size: Footprint, spread: Spread, move: Moved) -> Footprint:
        """The model's size after one move."""
        layer, name, count = move
        kept = spread[layer]
        before, after = self.layer(layer, kept), self.layer(layer, {**kept, name: count})
        return Footprint(
            *(
                whole - old + new
                for whole, old, new in zip(
                    _numbers(size), _numbers(before), _numbers(after), strict=True
                )
            )
        )


def _numbers(size: Footprint) -> tuple[Any, ...]:
    return tuple(vars(size).values())


def levels(units: int, unit_parameters: int, most: float, round_to: int, count: int) -> list[int]:
    """About `count` evenly spaced numbers of units below `units`, descending; at the least, `most`
    parameters are lost.
    """
    fewest = max(0, units - int(most // unit_parameters))
    step = max(1, math.ceil((units - fewest) / count / round_to)) * round_to
    spaced = list(range((units - 1) // round_to * round_to, max(fewest, 1) - 1, -step))
    return [*spaced, 0] if fewest == 0 else spaced


def cheapest(budget: Budget, losses: Losses) -> Spread:
    """The spread that meets the budget, found by taking ever again the units with the least
    predicted loss for what they take.

    A move may skip levels, so that a curve that is not convex is walked along its hull.

    Raises:
        SpecError: no spread within the bounds meets the budget.
    """
    spread = [{name: max(curve) for name, curve in layer.items()} for layer in losses]
    for layer, kept in enumerate(spread):
        while not budget.loses_enough(layer, kept):
            allowed = [move for move in _removals(budget, spread, losses) if move[0] == layer]
            if not allowed:
                break
            _take(
                spread,
                min(
                    allowed,
                    key=lambda move: (
                        _price(losses, spread, move) / _parameters(budget, spread, move)
                    ),
                ),
            )
    size = budget.size(spread)
    while (over := budget.excess(size)) > 0:
        saved = {
            move: over - budget.excess(budget.moved(size, spread, move))
            for move in _removals(budget, spread, losses)
        }
        useful = [move for move, gain in saved.items() if gain > 0]
        if not useful:
            raise SpecError(
                "budget: no allocation within its bounds meets the targets; raise"
                " budget.allocation.most, or ask for less"
            )
        best = min(useful, key=lambda move: _price(losses, spread, move) / saved[move])
        size = budget.moved(size, spread, best)
        _take(spread, best)
    return spread


def _removals(budget: Budget, spread: Spread, losses: Losses) -> Iterator[Moved]:
    for layer, kept in enumerate(spread):
        for name, curve in losses[layer].items():
            for count in curve:
                if count < kept[name] and budget.may_lose(layer, {**kept, name: count}):
                    yield layer, name, count


def _price(losses: Losses, spread: Spread, move: Moved) -> float:
    layer, name, _ = move
    return loss_at(losses, move) - loss_at(losses, (layer, name, spread[layer][name]))


def _parameters(budget: Budget, spread: Spread, move: Moved) -> int:
    layer, name, count = move
    return budget.lost(layer, {**spread[layer], name: count}) - budget.lost(layer, spread[layer])


def _take(spread: Spread, move: Moved) -> None:
    layer, name, count = move
    spread[layer][name] = count


def loss_at(losses: Losses, at: Moved) -> float:
    """The predicted loss of one group, between levels by linear interpolation."""
    layer, name, count = at
    curve = losses[layer][name]
    counts = sorted(curve)
    return float(np.interp(count, counts, [curve[known] for known in counts]))


def predicted_loss(losses: Losses, spread: Spread) -> float:
    """The losses of all groups together."""
    return math.fsum(
        loss_at(losses, (layer, name, count))
        for layer, kept in enumerate(spread)
        for name, count in kept.items()
    )


def filled(budget: Budget, spread: Spread, losses: Losses) -> Spread:
    """The spread with what the budget still allows given back, in steps of FFN channels: most
    predicted loss first.
    """
    spread, size = [dict(kept) for kept in spread], budget.size(spread)
    while True:
        fitting = [
            move
            for move in _returns(budget, spread, losses)
            if budget.excess(budget.moved(size, spread, move)) == 0
        ]
        if not fitting:
            return spread
        best = min(fitting, key=lambda move: _price(losses, spread, move))
        size = budget.moved(size, spread, best)
        _take(spread, best)


def _returns(budget: Budget, spread: Spread, losses: Losses) -> Iterator[Moved]:
    """A step more channels, in any layer that would still have lost enough."""
    for layer, kept in enumerate(spread):
        for name in budget.channels:
            count = min(kept[name] + budget.steps[name], max(losses[layer][name]))
            enough = budget.loses_enough(layer, {**kept, name: count})
            if kept[name] and count > kept[name] and enough:
                yield layer, name, count


def mutated(budget: Budget, spread: Spread, losses: Losses, chance: random.Random) -> Spread:
    """A neighbour: some groups lose a level, others, in random order, gain levels for as long as
    the budget is met.
    """
    child, places = (
        [dict(kept) for kept in spread],
        [(layer, name) for layer, groups in enumerate(losses) for name in groups],
    )
    lowered = set()
    for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
        layer, name = place = chance.choice(places)
        below = [count for count in losses[layer][name] if count < child[layer][name]]
        if below and budget.may_lose(layer, {**child[layer], name: max(below)}):
            child[layer][name] = max(below)
            lowered.add(place)
    raised = [place for place in places if place not in lowered]
    chance.shuffle(raised)
    size = budget.size(child)
    for layer, name in raised:
        above = [count for count in losses[layer][name] if count > child[layer][name]]
        if not above or not budget.loses_enough(layer, {**child[layer], name: min(above)}):
            continue
        if budget.excess(after := budget.moved(size, child, (layer, name, min(above)))) == 0:
            size, child[layer][name] = after, min(above)
    return child


Scores = Sequence[Mapping[str, Sequence[float]]]
"""For every layer and group, the score of each unit."""


def above_threshold(budget: Budget, scores: Scores, fixed: Mapping[str, int]) -> Spread:
    """The units with the highest scores of all layers, as many as the budget allows, in the nearest
    multiples (`Budget.steps`) with which it is met.

    A unit costs what it takes; the lowest scores go first (arXiv 2412.12441, arXiv 2312.11983).
    Groups that have no scores keep the `fixed` numbers.

    Raises:
        SpecError: no multiples meet the budget.
    """
    spread = [{**fixed, **{name: len(units) for name, units in layer.items()}} for layer in scores]
    pooled = sorted(
        (score, layer, name)
        for layer, groups in enumerate(scores)
        for name, units in groups.items()
        for score in units
    )
    size = budget.size(spread)
    for _, layer, name in pooled:
        if budget.excess(size) == 0:
            break
        move = (layer, name, spread[layer][name] - 1)
        if move[2] == 0 and name in budget.some_stay:
            continue
        size = budget.moved(size, spread, move)
        _take(spread, move)
    return filled(
        budget,
        _rounded(budget, spread, scores),
        [{name: _regret(units) for name, units in layer.items()} for layer in scores],
    )


def _rounded(budget: Budget, spread: Spread, scores: Scores) -> Spread:
    """Units in multiples: up at first, then down where that is nearest, for as long as the budget
    is exceeded. All of a layer's units stay all, and where some stay a step stays.

    Raises:
        SpecError: the budget is exceeded with a step in every layer.
    """
    steps, rounded = budget.steps, [dict(kept) for kept in spread]
    stepped = [name for name in scores[0] if name in budget.channels or steps[name] > 1]
    places = [(layer, name) for name in stepped for layer in range(len(spread))]
    for layer, name in places:
        up = -(-spread[layer][name] // steps[name]) * steps[name]
        rounded[layer][name] = min(up, len(scores[layer][name]))
    size = budget.size(rounded)
    while budget.excess(size) > 0:
        above = {
            (layer, name): (rounded[layer][name] - spread[layer][name]) / steps[name]
            for layer, name in places
            if rounded[layer][name] > steps[name]
        }
        if not above:
            least = max(steps[name] for name in budget.channels)
            raise SpecError(
                f"budget: not met with {least} FFN channels (budget.round_to) in every layer that"
                " keeps any; lower budget.round_to, or ask for less"
            )
        layer, name = max(above, key=lambda place: (above[place], place[0]))
        move = (layer, name, (rounded[layer][name] - 1) // steps[name] * steps[name])
        size = budget.moved(size, rounded, move)
        _take(rounded, move)
    return rounded


def _regret(scores: Sequence[float]) -> dict[int, float]:
    """What is lost with the lowest scores, by number of units that stay: scores above the least of
    all, summed.
    """
    ordered = sorted(scores)
    lost = (
        np.concatenate([[0.0], np.cumsum(np.array(ordered) - ordered[0])])
        if ordered
        else np.zeros(1)
    )
    return {len(ordered) - gone: float(sum_) for gone, sum_ in enumerate(lost)}
