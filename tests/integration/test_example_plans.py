"""The plans of published models: right numbers, fast, without torch, ray, weights or texts."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.reporting.plan_view import duration, plan_parts
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError
from rayprune.specs.loader import load_job
from rayprune.specs.machine import PROFILES
from rayprune.workers.model.checkpoint import planned_checkpoint
from tests.helpers import some

PLANS = Path(__file__).parents[2] / "examples" / "plans"
BILLIONS = {
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "mixtral-8x22b": 140.62,
    "deepseek-v3": 671.03,
}
ACTIVE_BILLIONS = {"mixtral-8x22b": 39.15, "deepseek-v3": 37.55}
BOTH_PLACEMENTS = [name for name in BILLIONS if name not in ACTIVE_BILLIONS]
"""Mixtures of experts are pruned with `shards` alone."""
COMMAND = """
import sys
from rayprune.orchestrator.cli import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "ray", "transformers"} & sys.modules.keys()
"""


def planned(name: str, *overrides: str) -> Plan:
    job = load_job(PLANS / name / "job.yaml", overrides)
    return make_plan(job, planned_checkpoint(Path(job.model.path)), PROFILES["h200-141gb"])


def test_every_example_is_looked_at() -> None:
    assert {path.name for path in PLANS.iterdir() if path.is_dir()} == BILLIONS.keys()


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_are_the_published_ones(name: str) -> None:
    plan = planned(name)
    assert plan.model.parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)
    assert plan.model.active_parameters / 1e9 == pytest.approx(
        ACTIVE_BILLIONS.get(name, BILLIONS[name]), abs=0.005
    )
    assert 0.2 <= 1 - plan.shape.decoder_parameters / plan.model.decoder_parameters < 0.22
    assert plan.needs.worker_memory_bytes <= PROFILES["h200-141gb"].memory_bytes
    assert plan.seconds is not None
    json.dumps(plan.document())


def children_seconds() -> float:
    """Processor time of the processes that this one has started, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", some(["llama-3.1-405b", "deepseek-v3"], "llama-3.1-405b"))
def test_a_plan_takes_seconds_and_not_more(name: str) -> None:
    """Of a processor, which others on the machine do not take; about one, without torch and Ray."""
    before = children_seconds()
    words = [
        sys.executable,
        "-c",
        COMMAND,
        "plan",
        str(PLANS / name / "job.yaml"),
        "--profile",
        "h200-141gb",
    ]
    done = subprocess.run(words, cwd=PLANS.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert children_seconds() - before < 5
    first = done.stdout.splitlines()[0]
    assert ("does not prune this model yet" in first) is (name == "deepseek-v3")


@pytest.mark.parametrize("name", BILLIONS)
def test_a_run_without_weights_is_refused(name: str, tmp_path: Path) -> None:
    def show(event: dict[str, Any]) -> None:
        raise AssertionError(event)

    with pytest.raises(
        ModelError,
        match=r"no weights found|quantised weights cannot be pruned|planned but not pruned",
    ):
        run_job(load_job(PLANS / name / "job.yaml"), tmp_path / "run", show)
    assert not (tmp_path / "run").exists()


def test_fp8_weights_are_counted_as_such() -> None:
    """688 GB are published with the layer of multi-token prediction (11.5 B parameters), which is
    no part of the plan.
    """
    assert planned("deepseek-v3").model.bytes_on_disk == pytest.approx(673e9, rel=0.005)


@pytest.mark.parametrize("name", BOTH_PLACEMENTS)
def test_both_placements_can_be_planned(name: str) -> None:
    plan = planned(name, "parallel.placement=layers")
    assert 1 <= plan.memory.layers_per_chunk <= -(-plan.model.num_layers // plan.workers)


@pytest.mark.parametrize("name", BILLIONS)
def test_the_table_says_what_the_plans_say(name: str) -> None:
    (row,) = (
        line
        for line in (PLANS / "README.md").read_text().splitlines()
        if f"({name}/job.yaml)" in line
    )
    placements = ("shards", "layers") if name in BOTH_PLACEMENTS else ("shards",)
    plans = [planned(name, f"parallel.placement={placement}") for placement in placements]
    cells = [
        cell
        for plan in plans
        for cell in (f"{plan.needs.worker_memory_bytes / 2**30:.1f} GiB", duration(plan.seconds))
    ]
    cells += ["", ""] * (2 - len(plans))
    assert [cell.strip() for cell in row.split("|")[-5:-1]] == cells


@pytest.mark.parametrize("name", BOTH_PLACEMENTS)
def test_the_other_placement_is_told_of_where_it_is_faster(name: str) -> None:
    shards, layers = planned(name), planned(name, "parallel.placement=layers")
    assert layers.seconds is not None
    assert shards.seconds_with_layers == pytest.approx(layers.seconds)
    assert layers.seconds_with_layers is None
    said = [part for part in plan_parts(shards) if "placement: layers" in str(part)]
    assert len(said) == 1
    assert duration(layers.seconds) in str(said[0])


@pytest.mark.parametrize(
    "overrides", [["parallel.workers=1"], ["correction.drift=0.5"], ["method=dress"]], ids=str
)
def test_the_other_placement_is_not_told_of_where_it_is_not(overrides: list[str]) -> None:
    assert planned("llama-3-8b", *overrides).seconds_with_layers is None
