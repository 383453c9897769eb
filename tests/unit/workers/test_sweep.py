"""The sweep's cache never changes its numbers: steps may be repeated, replayed and restored in any
order.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.orchestrator.cli import main
from rayprune.specs.errors import SpecError
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.files import MANIFEST_NAME
from rayprune.workers.worker import Worker
from tests.conftest import MakeJob, MakeModel


@pytest.fixture
def finished(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> tuple[Any, Path]:
    """A finished run of both groups with hidden states saved at every second layer, and its job."""
    job = make_job(make_model(), budget={"kv_groups": 1}, memory={"checkpoint_layers": 2})
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 0
    return load_job(job), tmp_path / "run"


def grams(parts: dict[Any, dict[str, np.ndarray]]) -> dict[Any, bytes]:
    """Statistics as bytes."""
    return {node: state["gram"].tobytes() for node, state in parts.items()}


def test_a_layer_can_be_collected_again_after_it_was_decided(finished: tuple[Any, Path]) -> None:
    worker = Worker(finished[0], str(finished[1]), "cpu", MemoryPlan())
    _, first = worker.run("collect", 1, "heads", (0, 4))
    _, cut = worker.run("decide", 1, "heads", 1, first)
    _, second = worker.run("collect", 1, "neurons", (0, 4), cut)
    _, first_again = worker.run("collect", 1, "heads", (0, 4))
    _, second_again = worker.run("collect", 1, "neurons", (0, 4), cut)
    assert grams(first) == grams(first_again)
    assert grams(second) == grams(second_again)


@pytest.mark.parametrize("keep_inputs", [True, False])
def test_replay_restore_and_going_back_give_the_same_bits(
    finished: tuple[Any, Path], keep_inputs: bool
) -> None:
    live, fresh = (
        Worker(finished[0], str(finished[1]), "cpu", MemoryPlan(keep_inputs=keep_inputs))
        for _ in range(2)
    )
    expected = {layer: grams(live.run("collect", layer, "heads", (0, 4))[1]) for layer in range(3)}
    assert list((finished[1] / "cache").rglob("layer-0002-*.safetensors"))
    for layer in (2, 0, 1):
        assert grams(fresh.run("collect", layer, "heads", (0, 4))[1]) == expected[layer]


def test_hidden_states_of_another_kind_of_device_are_refused(finished: tuple[Any, Path]) -> None:
    # saves them
    Worker(finished[0], str(finished[1]), "cpu", MemoryPlan()).run("collect", 2, "heads", (0, 4))
    manifest = finished[1] / "tasks" / "layer-0001" / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace("cpu in float32", "cuda in bfloat16"))
    with pytest.raises(
        SpecError,
        match=(
            "layer-0001: was computed on cuda in bfloat16, this worker computes on cpu in float32"
        ),
    ):
        Worker(finished[0], str(finished[1]), "cpu", MemoryPlan()).run(
            "collect", 2, "heads", (0, 4)
        )
