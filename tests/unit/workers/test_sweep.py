"""The sweep's cache never changes its numbers: steps may be repeated, replayed and restored in any
order.
"""

from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.executor import InProcessExecutor
from rayprune.orchestrator.execution.steps import Steps
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from tests.conftest import MakeJob, MakeModel, edit_manifest


@pytest.fixture
def finished(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> tuple[JobSpec, Path]:
    """A finished run of both groups with hidden states saved at every second layer, and its job."""
    job = make_job(make_model(), budget={"kv_groups": 1}, memory={"checkpoint_layers": 2})
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 0
    return load_job(job), tmp_path / "run"


def grams(parts: Any) -> dict[Any, bytes]:
    """Statistics as bytes."""
    return {node: statistic.state()["gram"].tobytes() for node, statistic in parts.items()}


def steps(finished: tuple[JobSpec, Path], keep_inputs: bool = True) -> Steps:
    """Of a new worker."""
    return InProcessExecutor(*finished, lambda _: MemoryPlan(keep_inputs=keep_inputs)).on(0)


def test_a_layer_can_be_collected_again_after_it_was_decided(
    finished: tuple[JobSpec, Path],
) -> None:
    worker = steps(finished)
    first = worker.collect(1, "heads", (0, 4)).payload
    expected = grams(first)
    cut = worker.decide(1, "heads", 1, first).payload
    second = worker.collect(1, "neurons", (0, 4), cut).payload
    first_again = worker.collect(1, "heads", (0, 4)).payload
    second_again = worker.collect(1, "neurons", (0, 4), cut).payload
    assert expected == grams(first_again)
    assert grams(second) == grams(second_again)


@pytest.mark.parametrize("keep_inputs", [True, False])
def test_replay_restore_and_going_back_give_the_same_bits(
    finished: tuple[JobSpec, Path], keep_inputs: bool
) -> None:
    live, fresh = (steps(finished, keep_inputs) for _ in range(2))
    expected = {layer: grams(live.collect(layer, "heads", (0, 4)).payload) for layer in range(3)}
    assert list((finished[1] / "cache").rglob("layer-0002-*.safetensors"))
    for layer in (2, 0, 1):
        assert grams(fresh.collect(layer, "heads", (0, 4)).payload) == expected[layer]


def test_hidden_states_of_another_kind_of_device_are_refused(
    finished: tuple[JobSpec, Path],
) -> None:
    # saves them
    steps(finished).collect(2, "heads", (0, 4))
    edit_manifest(
        finished[1] / "tasks" / "layer-0001",
        lambda value: value["info"].update(computed_on="cuda in bfloat16"),
    )
    with pytest.raises(
        SpecError,
        match=(
            "layer-0001: was computed on cuda in bfloat16, this worker computes on cpu in float32"
        ),
    ):
        steps(finished).collect(2, "heads", (0, 4))
