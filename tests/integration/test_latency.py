"""Latency budgets: a table is measured, the exported model meets what the table says of its
sizes.
"""

from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.reporting.report import read_report
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError
from rayprune.specs.latency import LatencyTable, load_latency
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel
from tests.helpers import quiet

TABLE = LatencyTable(
    machine="somewhere",
    device="cpu",
    dtype="float32",
    batch=1,
    tokens=16,
    outer_ms=1.0,
    layer_ms=10.0,
    narrowed_ms={"heads": {0: 7.0, 1: 8.0, 2: 10.0}, "neurons": {0: 4.0, 24: 6.0, 48: 10.0}},
)


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
    (tmp_path / "table.yaml").write_text(TABLE.model_dump_json())
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
        table.write_text(TABLE.model_copy(update={"outer_ms": outer}).model_dump_json())
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
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["latency", str(make_model("qwen3")), "--tokens", "8", "--threads", "1"]) == 0
    (tmp_path / "measured.yaml").write_text(capsys.readouterr().out)
    table = load_latency(str(tmp_path / "measured.yaml"))
    assert (table.batch, table.tokens) == (1, 8)
    for name, units in (("heads", 2), ("neurons", 48)):
        times = [table.narrowed_ms[name][count] for count in sorted(table.narrowed_ms[name])]
        assert times == sorted(times)
        assert table.narrowed_ms[name][units] == table.layer_ms


def test_a_latency_without_a_table_or_with_a_broken_one_is_refused(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="latency_ms needs latency_table"):
        load_job(make_job(make_model(), budget={"sparsity": None, "latency_ms": 5}))
    (tmp_path / "half.yaml").write_text(
        TABLE.model_copy(update={"narrowed_ms": {"heads": {2: 1.0}}}).model_dump_json()
    )
    (tmp_path / "broken.yaml").write_text("machine: here")
    for name, message in (
        ("half", r"narrowed_ms lacks \['neurons'\]"),
        ("broken", r"broken\.yaml: layer_ms: Field required"),
    ):
        table = str(tmp_path / f"{name}.yaml")
        budget = {"sparsity": None, "latency_ms": 5, "latency_table": table}
        with pytest.raises(SpecError, match=message):
            run_job(load_job(make_job(make_model(), budget=budget)), tmp_path / "run", quiet)
