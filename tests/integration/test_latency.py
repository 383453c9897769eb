"""Latency budgets: a table is measured, the exported model meets what the table says of its
sizes.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.entry import plan
from rayprune.orchestrator.reporting.plan_view import plan_parts
from rayprune.orchestrator.reporting.report import read_report
from rayprune.orchestrator.reporting.tables import Table
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError
from rayprune.specs.latency import LatencyTable, load_latency
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.caches import with_cache
from rayprune.workers.network.stacks import Stacks
from rayprune.workers.tools import latency
from tests.conftest import MakeJob, MakeModel
from tests.helpers import quiet

ABOUT = {"machine": "somewhere", "device": "cpu", "dtype": "float32"}
PASS = {
    "batch": 1,
    "tokens": 16,
    "outer_ms": 1.0,
    "layer_ms": 10.0,
    "narrowed_ms": {"heads": {0: 7.0, 1: 8.0, 2: 10.0}, "neurons": {0: 4.0, 24: 6.0, 48: 10.0}},
}
FIRST_FORM = ABOUT | PASS
TABLE = LatencyTable.model_validate(FIRST_FORM).passes[0]
LONGER = PASS | {"phase": "prefill", "tokens": 32}
DECODE = PASS | {
    "phase": "decode",
    "batch": 4,
    "outer_ms": 2.0,
    "layer_ms": 4.0,
    "narrowed_ms": {"heads": {2: 4.0}, "neurons": {0: 0.5, 48: 4.0}},
}
GRID = ABOUT | {"passes": [{"phase": "prefill", **PASS}, LONGER, DECODE]}


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((2, 48), 10.0),
        ((1, 48), 8.0),
        ((2, 24), 6.0),
        ((1, 24), 4.0),
        ((0, 36), 5.0),
        ((2, 12), 5.0),
        ((0, 0), 1.0),
    ],
)
def test_savings_add_up_and_are_interpolated(kept: tuple[int, int], expected: float) -> None:
    assert TABLE.layer({"heads": kept[0], "neurons": kept[1]}) == pytest.approx(expected)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_exported_sizes_meet_the_budget_to_one_step(
    per_layer: bool, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    (tmp_path / "table.yaml").write_text(json.dumps(FIRST_FORM))
    limit = 3 * 7.5 + 1.0
    budget = {
        "sparsity": None,
        "latency_ms": limit,
        "latency_table": str(tmp_path / "table.yaml"),
        "per_layer": per_layer,
    }
    run_job(load_job(make_job(make_model(), budget=budget)), tmp_path / "run", quiet)
    exported = open_checkpoint(tmp_path / "run" / "model").model
    kept = [{group.name: group.num_units for group in layer.groups} for layer in exported.layers]
    taken = TABLE.outer_ms + sum(TABLE.layer(sizes) for sizes in kept)
    step = 3 * 4 / 6 if not per_layer else 4 / 6  # four channels, in all layers or in one
    assert limit - step < taken <= limit


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_table_that_was_measured_again_is_noticed(
    per_layer: bool, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    table = tmp_path / "table.yaml"
    budget = {
        "sparsity": None,
        "latency_ms": 23.5,
        "latency_table": str(table),
        "per_layer": per_layer,
    }
    job = load_job(make_job(make_model(), budget=budget))
    for outer in (1.0, 2.0):
        table.write_text(json.dumps(FIRST_FORM | {"outer_ms": outer}))
        load_latency.cache_clear()
        if outer == 1.0:
            before = run_job(job, tmp_path / "run", quiet)
    run_job(job, tmp_path / "run", quiet)
    run_job(job, tmp_path / "fresh", quiet)
    again, fresh = (read_report(tmp_path / name) for name in ("run", "fresh"))
    assert again.parameters == fresh.parameters != before.parameters


@pytest.mark.parametrize("option", ["--batch", "--tokens", "--threads"])
def test_numbers_that_measure_nothing_are_refused(
    option: str, make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["latency", str(make_model()), option, "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_a_measured_table_can_be_loaded_and_rises(
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    command = ["latency", str(make_model("qwen3")), "--tokens", "8", "--threads", "1"]
    assert main(command) == 0
    told, progress = capsys.readouterr()
    assert progress.splitlines() == [f"{p}, 1 x 8: 2 rounds" for p in ("prefill", "decode")]
    (tmp_path / "measured.yaml").write_text(told)
    table = load_latency(str(tmp_path / "measured.yaml"))
    assert [str(one) for one in table.passes] == [
        f"{phase} of 1 x 8 tokens" for phase in ("prefill", "decode")
    ]
    assert {"torch", "transformers"} == table.versions.keys()
    for one in table.passes:
        for name, units in (("heads", 2), ("neurons", 48)):
            times = [one.narrowed_ms[name][count] for count in sorted(one.narrowed_ms[name])]
            assert times == sorted(times)
            assert one.narrowed_ms[name][units] == one.layer_ms


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({0: 1.0, 8: 5.0, 16: 3.0}, {0: 1.0, 8: 4.0, 16: 4.0, 24: 6.0}),  # noise is shared
        ({0: 1.0, 8: 9.0}, {0: 1.0, 8: 6.0, 24: 6.0}),  # none is slower than the whole
        ({}, {24: 6.0}),
    ],
)
def test_a_narrower_block_never_counts_as_slower(
    measured: dict[int, float], expected: dict[int, float]
) -> None:
    assert latency.rising(measured, 24, 6.0) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "falcon", "gemma3_text", "gemma3"])
def test_every_kind_of_model_is_timed_with_its_cache(family: str, make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model(family))
    stacks = Stacks(checkpoint, torch.float32, torch.device("cpu"))
    units = checkpoint.model.units
    for kept in (units, units | {"neurons": 8}, units | {"neurons": 0}):
        layers = stacks.layers(kept, 2, 3, 1)
        cache, network = stacks.cache(layers, 3, 5), stacks.network(layers)
        out = network(torch.zeros(3, 1, dtype=torch.int64), **with_cache(network, cache))
        assert out.logits.shape[:2] == (3, 1)
        assert bool(torch.isfinite(out.logits).all())
        assert cache.get_seq_length() == 6


def test_a_mixture_is_timed_by_experts_and_their_channels_which_a_budget_counts(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    model = make_model("mixtral")
    units = open_checkpoint(model).model.units
    table = latency.measure_latency(model, latency.Wanted(phases=["prefill"], tokens=[4]))
    (one,) = table.passes
    assert min(one.narrowed_ms["experts"]) >= 2  # those of a token
    assert all(count % 8 == 0 for count in one.narrowed_ms["neurons"])
    # a layer takes 1 ms, half the channels half of it
    times = {name: {0: 0.0 if name == "neurons" else 1.0, n: 1.0} for name, n in units.items()}
    made = PASS | {"phase": "prefill", "outer_ms": 0.0, "layer_ms": 1.0, "narrowed_ms": times}
    (tmp_path / "table.yaml").write_text(json.dumps(ABOUT | {"passes": [made]}))
    budget = {
        "sparsity": None,
        "kv_groups": units["heads"],
        "latency_ms": 3 * 0.5 + 1e-6,
        "latency_table": str(tmp_path / "table.yaml"),
    }
    planned = plan(load_job(make_job(model, budget=budget)))
    assert planned.shape.kept == units | {"neurons": units["neurons"] // 2}


@pytest.mark.parametrize(
    ("asked", "neurons"),
    [  # 3 layers, channels in fours
        ({"decode": 4e3 / 8.01}, 20),  # 2 + 3 * (0.5 + 3.5 * 20 / 48) = 7.875 ms for 4 x 1 tokens
        ({"decode": 4e3 / 8.76}, 24),  # 2 + 3 * (0.5 + 3.5 * 24 / 48) = 8.75 ms
        ({"prefill": 16e3 / 19.01, "batch": 1, "tokens": 16}, 24),  # 1 + 3 * 6
        ({"prefill": 32e3 / 19.01, "tokens": 32}, 24),
        ({"prefill": 16e3 / 19.01, "decode": 4e3 / 8.01, "tokens": 16}, 20),
    ],
)
def test_tokens_per_second_are_those_of_the_named_pass(
    asked: dict[str, Any], neurons: int, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    budget = {"sparsity": None, "kv_groups": 2, "tokens_per_second": asked}
    planned = plan(load_job(make_job(make_model(), budget=budget | grid(tmp_path))))
    assert planned.shape.kept == {"heads": 2, "neurons": neurons}
    # beside the size: 10 ms a layer in all passes but the last, 4 there
    assert [speed.dense for speed in planned.speeds] == [
        pytest.approx(value) for value in (16e3 / 31, 32e3 / 31, 4e3 / 14)
    ]
    shown = next(part for part in plan_parts(planned) if isinstance(part, Table))
    assert "of dense)" in shown.rows[-1][1]


def grid(folder: Path) -> dict[str, str]:
    """The option that names a table of several passes."""
    (folder / "table.yaml").write_text(json.dumps(GRID))
    return {"latency_table": str(folder / "table.yaml")}


def test_a_pass_that_is_not_named_is_refused_with_those_there_are(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    for number, (asked, message) in enumerate(
        {
            ("latency_ms", 5.0): "budget.latency_ms: 2 passes",
            ("tokens_per_second", 5.0): "budget.tokens_per_second.prefill: 2 passes",
        }.items()
    ):
        value = asked[1] if asked[0] == "latency_ms" else {"prefill": asked[1]}
        budget = {"sparsity": None, asked[0]: value} | grid(tmp_path)
        with pytest.raises(SpecError, match=message) as refused:
            plan(load_job(make_job(make_model(), f"{number}.yaml", budget=budget)))
        assert "prefill of 1 x 32 tokens, decode of 4 x 16 tokens" in str(refused.value)


@pytest.mark.parametrize("per_layer", [False, True])
def test_weights_and_cache_fit_the_memory(
    per_layer: bool, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    limit = 130_000
    memory = {"bytes": limit, "batch": 2, "context": 10}
    budget = {"sparsity": None, "memory": memory, "per_layer": per_layer}
    run_job(load_job(make_job(make_model(), budget=budget)), tmp_path / "run", quiet)
    exported = open_checkpoint(tmp_path / "run" / "model")
    weights = sum(4 * math.prod(info.shape) for info in exported.tensors.values())
    groups = [group for layer in exported.model.layers for group in layer.groups]
    cached = 4 * sum(group.cached_of(group.num_units) for group in groups)
    step = (
        4 * 4 * 3 * exported.model.hidden * (1 if per_layer else 3)
    )  # four channels of three matrices
    assert limit - step < weights + 2 * 10 * cached <= limit


def test_a_latency_without_a_table_or_with_a_broken_one_is_refused(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="latency_ms needs latency_table"):
        load_job(make_job(make_model(), budget={"sparsity": None, "latency_ms": 5}))
    with pytest.raises(SpecError, match="tokens_per_second needs latency_table"):
        load_job(make_job(tmp_path, budget={"tokens_per_second": {"decode": 5}}))
    with pytest.raises(SpecError, match="asks for nothing"):
        load_job(make_job(tmp_path, budget={"tokens_per_second": {"batch": 5}}))
    (tmp_path / "half.yaml").write_text(
        json.dumps(FIRST_FORM | {"narrowed_ms": {"heads": {2: 1.0}}})
    )
    (tmp_path / "broken.yaml").write_text("machine: here")
    for name, message in (
        ("half", r"narrowed_ms lacks \['neurons'\]"),
        ("broken", r"broken\.yaml:1: passes: is required"),
    ):
        table = str(tmp_path / f"{name}.yaml")
        budget = {"sparsity": None, "latency_ms": 5, "latency_table": table}
        with pytest.raises(SpecError, match=message):
            run_job(load_job(make_job(make_model(), budget=budget)), tmp_path / "run", quiet)
