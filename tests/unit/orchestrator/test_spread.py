"""The budget over the layers, against brute force where that is possible."""

import random
from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path

import pytest

from rayprune.orchestrator.stages.spread import (
    Budget,
    Losses,
    Spread,
    above_threshold,
    cheapest,
    filled,
    levels,
    mutated,
    predicted_loss,
)
from rayprune.specs.errors import SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel

LAYERS, CHANNEL = 3, 3 * 32
"""Layers of the model, and parameters of one FFN channel."""


def budget_of(model: Path, make_job: MakeJob, sparsity: float, **bounds: float) -> Budget:
    job = load_job(make_job(model, budget={"sparsity": sparsity, "round_to": 4}))
    return Budget(job, open_checkpoint(model), **bounds)


def convex(seed: int, counts: list[int]) -> dict[int, float]:
    """A loss that grows ever faster the fewer units stay."""
    chance = random.Random(seed)
    steps = sorted(chance.random() for _ in counts)
    return {48: 0.0} | {count: sum(steps[: number + 1]) for number, count in enumerate(counts)}


@pytest.mark.parametrize(
    ("units", "cost", "most", "round_to", "count", "expected"),
    [
        (48, 10, 120, 4, 12, [44, 40, 36]),
        (48, 10, 480, 4, 4, [44, 32, 20, 8, 0]),
        (48, 10, 479, 16, 100, [32, 16]),
        (
            1536,
            1728,
            1e9,
            64,
            12,
            [1472, 1344, 1216, 1088, 960, 832, 704, 576, 448, 320, 192, 64, 0],
        ),
        (3, 100, 100, 1, 12, [2]),
        (3, 100, 99, 1, 12, []),
        (1, 100, 100, 1, 12, [0]),
    ],
)
def test_levels(
    units: int, cost: int, most: float, round_to: int, count: int, expected: list[int]
) -> None:
    assert levels(units, cost, most, round_to, count) == expected


@pytest.mark.parametrize("seed", range(8))
def test_of_convex_curves_the_cheapest_spread_is_the_best_one(
    seed: int, make_model: MakeModel, make_job: MakeJob
) -> None:
    counts = [44, 40, 36, 32]
    losses = [
        {"heads": {2: 0.0}, "neurons": convex(10 * seed + layer, counts)} for layer in range(LAYERS)
    ]
    model = make_model()
    dense = open_checkpoint(model).decoder_parameters
    # five steps of four channels, exactly
    budget = budget_of(model, make_job, 5 * 4 * CHANNEL / dense)
    spreads = [spread_of(widths) for widths in product([48, *counts], repeat=LAYERS)]
    best = min(
        predicted_loss(losses, spread)
        for spread in spreads
        if not budget.excess(budget.size(spread))
    )
    assert predicted_loss(losses, cheapest(budget, losses)) == pytest.approx(best)


def spread_of(widths: tuple[int, ...]) -> Spread:
    return [{"heads": 2, "neurons": width} for width in widths]


def test_units_are_taken_where_they_cost_least_for_what_they_take(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    budget = budget_of(make_model(), make_job, 0.05)
    dear, cheap = {48: 0.0, 24: 10.0}, {48: 0.0, 24: 1.0}
    heads = {2: 0.0, 1: 100.0}
    losses = [{"heads": heads, "neurons": cheap if layer == 1 else dear} for layer in range(LAYERS)]
    assert cheapest(budget, losses) == [
        {"heads": 2, "neurons": 48},
        {"heads": 2, "neurons": 24},
        {"heads": 2, "neurons": 48},
    ]
    losses[2] = {"heads": {2: 0.0, 1: 0.01, 0: 0.02}, "neurons": dear}
    assert cheapest(budget, losses)[2]["heads"] < 2


def test_bounds_hold_and_a_budget_out_of_their_reach_is_refused(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model()
    losses = [
        {"heads": {2: 0.0}, "neurons": convex(layer, list(range(44, 0, -4)))}
        for layer in range(LAYERS)
    ]
    budget = budget_of(model, make_job, 0.2, least=8 * CHANNEL, most=24 * CHANNEL)
    spread = cheapest(budget, losses)
    assert all(8 * CHANNEL <= budget.lost(*each) <= 24 * CHANNEL for each in enumerate(spread))
    with pytest.raises(SpecError, match=r"raise budget\.allocation\.most"):
        cheapest(budget_of(model, make_job, 0.3, most=4 * CHANNEL), losses)


def test_layers_of_other_sizes_may_lose_as_much_of_themselves(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    """A mixture whose first layer has an FFN in place of experts; a shared expert follows the
    others.
    """
    budget = budget_of(make_model("deepseek_v3"), make_job, 0.2, least=100.0, most=1e4)
    model = budget.checkpoint.model
    kept = model.units | {"dense": 8, "neurons": 8, "experts": 4}
    sizes = [layer.cut_shapes(model.followed(kept)) for layer in model.layers]
    found = [sum(map(prod, shapes.values())) for shapes in sizes]
    assert [budget.layer(n, kept).decoder_parameters for n in range(LAYERS)] == found
    assert budget.size([kept] * LAYERS).decoder_parameters == sum(found)
    dense, experts, _ = (layer.parameters for layer in model.layers)
    mean = (dense + 2 * experts) / 3
    assert budget.most_with("dense") == pytest.approx(1e4 * dense / mean)
    assert budget.most_with("heads") == budget.most_with("neurons")
    assert budget.most_with("neurons") == pytest.approx(1e4 * experts / mean)
    assert not budget.loses_enough(0, model.units)
    assert budget.may_lose(0, model.units)


def test_what_the_budget_still_allows_is_given_back(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    budget = budget_of(make_model(), make_job, 0.2)
    losses = [{"heads": {2: 0.0}, "neurons": {48: 0.0, 0: 1.0 + layer}} for layer in range(LAYERS)]
    spread = filled(budget, spread_of((20, 20, 20)), losses)
    assert budget.excess(budget.size(spread)) == 0
    assert spread[2]["neurons"] == 48  # the dearest first
    for layer, kept in enumerate(spread):
        if kept["neurons"] < 48:
            more = [dict(kept) for kept in spread]
            more[layer]["neurons"] += 4
            assert budget.excess(budget.size(more)) > 0


def losses_with_levels() -> Losses:
    return [
        {
            "heads": {2: 0.0, 1: 1000.0},
            "neurons": {count: float(48 - count) for count in range(48, 0, -4)},
        }
        for _ in range(LAYERS)
    ]


def test_mutations_keep_the_budget_and_its_levels(make_model: MakeModel, make_job: MakeJob) -> None:
    budget, losses = budget_of(make_model(), make_job, 0.25), losses_with_levels()
    spread = cheapest(budget, losses)
    children = [mutated(budget, spread, losses, random.Random(seed)) for seed in range(50)]
    assert len({str(child) for child in children}) > 10
    for child in children:
        assert budget.excess(budget.size(child)) == 0
        assert all(
            kept[name] in losses[layer][name] for layer, kept in enumerate(child) for name in kept
        )
    assert children == [mutated(budget, spread, losses, random.Random(seed)) for seed in range(50)]


def test_mutations_leave_every_layer_its_least_loss(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    budget, losses = (
        budget_of(make_model(), make_job, 0.25, least=8 * CHANNEL),
        losses_with_levels(),
    )
    spread = cheapest(budget, losses)
    for seed in range(100):
        assert all(
            budget.lost(*each) >= 8 * CHANNEL
            for each in enumerate(mutated(budget, spread, losses, random.Random(seed)))
        )


def test_one_threshold_keeps_the_highest_scores(make_model: MakeModel, make_job: MakeJob) -> None:
    model = make_model()
    dense = open_checkpoint(model).decoder_parameters
    budget = budget_of(model, make_job, 40 * CHANNEL / dense)
    scores = [
        {"heads": [9.0, 9.0], "neurons": [layer + channel / 48 for channel in range(48)]}
        for layer in range(LAYERS)
    ]
    assert above_threshold(budget, scores, {}) == spread_of((8, 48, 48))
    alone = [{"neurons": groups["neurons"]} for groups in scores]
    assert above_threshold(budget, alone, {"heads": 2}) == spread_of((8, 48, 48))
    scores[2]["heads"] = [-1.0, 9.0]
    assert above_threshold(budget, scores, {})[2]["heads"] == 1


def graded(kept: Sequence[int], units: int) -> list[dict[str, list[float]]]:
    """Scores of which so many of each layer are high, and higher than 1 no two alike."""
    return [
        {
            "neurons": [
                0.001 * channel + (1.0 if channel < high else 0.0) for channel in range(units)
            ]
        }
        for high in kept
    ]


def rounded_by(budget: Budget, kept: Sequence[int], units: int = 48) -> list[int]:
    """What the layers keep whose scores say `kept`."""
    spread = above_threshold(budget, graded(kept, units), {"heads": 2})
    assert budget.excess(budget.size(spread)) == 0
    return [layer["neurons"] for layer in spread]


def budget_for(
    kept: Sequence[int], round_to: int, make_model: MakeModel, make_job: MakeJob, units: int = 48
) -> Budget:
    """Just what a model with so many channels in its layers takes."""
    model = make_model(num_hidden_layers=len(kept), intermediate_size=units)
    dense = open_checkpoint(model).decoder_parameters
    lost = (len(kept) * units - sum(kept)) * CHANNEL
    job = make_job(model, budget={"sparsity": lost / dense, "round_to": round_to})
    return Budget(load_job(job), open_checkpoint(model))


def test_rounding_takes_no_layer_away(make_model: MakeModel, make_job: MakeJob) -> None:
    kept = [38, 207, 218, 214]
    budget = budget_for(kept, 64, make_model, make_job, units=256)
    assert rounded_by(budget, kept, 256) == [64, 192, 192, 192]
    budget = budget_for([0, 207, 218, 214], 64, make_model, make_job, units=256)
    assert rounded_by(budget, [0, 207, 218, 214], 256) == [0, 192, 192, 192]


@pytest.mark.parametrize("seed", range(20))
def test_rounding_keeps_the_order_of_the_layers_and_uses_the_budget(
    seed: int, make_model: MakeModel, make_job: MakeJob
) -> None:
    kept = [random.Random(seed + 100 * layer).randint(1, 48) for layer in range(5)]
    budget = budget_for(kept, 8, make_model, make_job)
    rounded = rounded_by(budget, kept)
    assert all(count % 8 == 0 and count for count in rounded)
    assert sum(kept) - 8 < sum(rounded) <= sum(kept)
    for one, other in product(range(5), repeat=2):
        assert kept[one] <= kept[other] or rounded[one] >= rounded[other]
    given, taken = kept.index(min(kept)), kept.index(max(kept))
    moved = [count + (layer == given) - (layer == taken) for layer, count in enumerate(kept)]
    assert rounded_by(budget, moved)[given] >= rounded[given]


def test_a_step_in_every_layer_that_is_too_much_is_refused(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    kept = [3, 3, 20]
    with pytest.raises(SpecError, match=r"lower budget\.round_to"):
        rounded_by(budget_for(kept, 16, make_model, make_job), kept)
