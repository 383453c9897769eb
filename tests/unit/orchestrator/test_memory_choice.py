"""Which way to use memory is taken, and what a refusal says."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from rayprune.orchestrator.planning import memory_choice
from rayprune.orchestrator.planning.memory_choice import (
    FREE_BYTES,
    SHORT,
    choices,
    choose_memory,
    fewest_workers,
)
from rayprune.orchestrator.planning.worker_memory import RUNTIME_BYTES, gib, peak_bytes
from rayprune.orchestrator.planning.workload import TrainingLoad, tokens_per_neuron
from rayprune.specs.calibration import FEW_TOKENS
from rayprune.specs.errors import ResourceError
from rayprune.specs.memory import MemoryPlan
from tests.unit.orchestrator.workloads import BIG, GPU, REFIT


def test_a_gpu_does_not_compute_on_statistics_in_files() -> None:
    assert not any(choice.spill_statistics for choice in choices(GPU))


def test_every_choice_comes_with_all_lengths_of_chunks() -> None:
    assert [choice.layers_per_chunk for choice in choices(REFIT)] == [3, 2, 1] * 4


def test_choices_are_taken_in_order() -> None:
    peaks = [peak_bytes(BIG, choice) for choice in choices(BIG)]
    assert all(more >= less for more, less in pairwise(peaks))
    for choice, peak in zip(choices(BIG), peaks, strict=True):
        assert choose_memory(BIG, peak) == choice
    chunked = replace(BIG, placement="layers", propagation="dense")
    assert choose_memory(chunked, None).layers_per_chunk == 3
    two = peak_bytes(chunked, MemoryPlan(layers_per_chunk=2))
    assert choose_memory(chunked, two) == MemoryPlan(layers_per_chunk=2)


def test_activations_of_a_training_are_kept_where_they_are_known_to_fit() -> None:
    training = TrainingLoad(
        windows=99, keeps_activations=None, pass_bytes=2, sequence_length=BIG.sequence_length
    )
    load = replace(BIG, trainings=(training,))
    keeping, *_ = choices(load)
    assert keeping == MemoryPlan(keep_activations=True)
    needed = peak_bytes(load, keeping)
    assert choose_memory(load, needed) == keeping
    assert not choose_memory(load, needed - 1).keep_activations
    assert not choose_memory(load, None).keep_activations
    told = replace(load, trainings=(replace(training, keeps_activations=True),))
    assert not any(choice.keep_activations for choice in choices(told))
    assert peak_bytes(told, MemoryPlan()) == needed


def test_workers_keep_freed_memory_as_far_as_there_is_room() -> None:
    peak = peak_bytes(BIG, next(choices(BIG)))
    likely = int((1 + SHORT) * peak)
    limits = (peak, likely, likely + 7, 10 * likely)
    assert [choose_memory(BIG, limit).free_bytes for limit in limits] == [0, 0, 7, FREE_BYTES]
    assert choose_memory(BIG, None).free_bytes == FREE_BYTES
    assert choose_memory(GPU, peak_bytes(GPU, next(choices(GPU)))).free_bytes == FREE_BYTES


def test_refusals_say_need_have_and_what_would_help() -> None:
    least = peak_bytes(BIG, list(choices(BIG))[-1])
    with pytest.raises(ResourceError) as caught:
        choose_memory(BIG, least - 1)
    message = str(caught.value)
    assert f"needs at least {gib(least)} (step " in message
    assert f"it may use {gib(least - 1)}; raise memory.worker to {gib(least)}" in message
    attention_bound = replace(BIG, workers=1, micro_batch=32)
    limit = peak_bytes(replace(attention_bound, micro_batch=1), list(choices(BIG))[-1])
    with pytest.raises(ResourceError, match=r"lower parallel\.micro_batch to 1"):
        choose_memory(attention_bound, limit)


def test_no_refusal_advises_too_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the windows would fit; that is advised where they are enough tokens."""
    enough = math.ceil(BIG.samples * FEW_TOKENS / tokens_per_neuron(BIG))
    monkeypatch.setattr(
        memory_choice, "fitting", lambda load, most: load.samples <= most and MemoryPlan()
    )
    for samples, advised in ((enough * 8, True), (enough * 8 - 8, False)):
        load = replace(BIG, shards=2, samples=samples, micro_batch=1)
        with pytest.raises(ResourceError) as caught:
            choose_memory(load, samples // 8)
        words = f"lower calibration.samples to {samples // 8}"
        assert (words in str(caught.value)) is advised
        assert ("lower calibration.samples" in str(caught.value)) is advised


def test_fewest_workers() -> None:
    two = peak_bytes(replace(BIG, workers=2), MemoryPlan())
    assert fewest_workers(replace(BIG, workers=8), two, keep_all=True) == 2
    assert fewest_workers(BIG, two) == 1
    assert fewest_workers(BIG, RUNTIME_BYTES) is None
