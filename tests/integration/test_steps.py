"""Progressive pruning: the same models as runs one after the other, a gate that closes where it
should, and nothing done twice.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.disk import still_needed
from rayprune.orchestrator.planning.steps import plan_job, relative_sparsity
from rayprune.orchestrator.reporting.html_report import html_report
from rayprune.orchestrator.reporting.report import Report, summary
from rayprune.orchestrator.reporting.tables import Table
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages import allocate
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.files import read_manifest
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

TRAINING = {"epochs": 1, "batch": 4, "learning_rate": 1e-3}
OWN = {"manifest.json", "README.md"}
"""What a run's model has of its own beside a step's."""


def steps_job(make_job: MakeJob, model: Path, **sections: Any) -> Path:
    method = {"name": "progressive", "steps": 3, "schedule": "linear", "gate": {"samples": 3}}
    sections["method"] = method | sections.get("method", {})
    budget = {"sparsity": 0.3, "kv_groups": 2, "round_to": 2}
    return make_job(model, **(sections | {"budget": budget | sections.get("budget", {})}))


def events_of(job: JobSpec, out: Path) -> tuple[Report, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return run_job(job, out, events.append), events


def done_in(events: list[dict[str, Any]]) -> list[str]:
    """Layers that were pruned."""
    return [
        f"{e['scope']}/{e['layer']}"
        for e in events
        if e["event"] == "step-finished" and "layer" in e
    ]


def test_steps_are_runs_one_after_the_other(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model()
    job = load_job(steps_job(make_job, model), ["method.keep_steps=true", "method.inner=obs"])
    plan = plan_job(job, open_checkpoint(model))
    report = run_job(job, tmp_path / "run", quiet)
    verify_run(tmp_path / "run")
    source, dense = open_checkpoint(model), open_checkpoint(model).decoder_parameters
    for number, sparsity in enumerate((0.1, 0.2, 0.3), 1):
        relative = relative_sparsity(sparsity, dense, source.decoder_parameters)
        single = load_job(
            steps_job(make_job, source.path), ["method=obs", f"budget.sparsity={relative}"]
        )
        run_job(single, tmp_path / f"single-{number}", quiet)
        source = open_checkpoint(tmp_path / f"single-{number}" / "model")
        step, planned = report.steps[number - 1], plan.steps[number - 1]
        assert step.model is not None
        kept = folder_bytes(tmp_path / "run" / step.model)
        expected = folder_bytes(source.path)
        for name in expected.keys() - OWN:
            assert kept[name] == expected[name], name
        assert step.decoder_parameters == source.decoder_parameters
        assert step.decoder_parameters == planned.shapes[0].decoder_parameters
        assert 1 - step.decoder_parameters / dense == step.removed >= sparsity
    whole = load_job(steps_job(make_job, model), ["method=obs"])
    (shape,) = plan_job(whole, open_checkpoint(model)).shapes
    assert report.decoder_parameters.after == shape.decoder_parameters, "as in one pass"
    final = folder_bytes(tmp_path / "run" / "model")
    assert {n: b for n, b in final.items() if n not in OWN} == {
        n: b for n, b in kept.items() if n not in OWN
    }
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    (table,) = [
        part for part in summary(report) if isinstance(part, Table) and part.title == "steps"
    ]
    assert [row[0] for row in table.rows] == ["1", "2", "3"]
    assert "<h2>Steps</h2>" in html_report(report, "")


def test_the_gate_closes_where_it_should_and_opens_again(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, out = steps_job(make_job, make_model()), tmp_path / "run"
    open_, events = events_of(load_job(job), out)
    values = [step.divergence for step in open_.steps]
    assert values == sorted(values)
    whole = folder_bytes(out / "model")
    assert len(done_in(events)) == 9
    assert sorted(path.name for path in (out / "tasks" / "step-02").iterdir()) == ["gate"]
    verify_run(out)
    again, events = events_of(load_job(job), out)
    assert done_in(events) == []
    assert [step.model_copy(update={"seconds": 0}) for step in again.steps] == [
        step.model_copy(update={"seconds": 0}) for step in open_.steps
    ]

    bound = f"method.gate.divergence={math.sqrt(values[1] * values[2])}"
    closed, events = events_of(load_job(job, [bound]), tmp_path / "closed")
    assert [bool(step.exceeded) for step in closed.steps] == [False, False, True]
    assert closed.decoder_parameters.after == closed.steps[1].decoder_parameters
    assert any("the gate closed at step 3 of 3" in warning for warning in closed.warnings)
    assert "model is that of step 2" in closed.warnings[-1]
    verify_run(tmp_path / "closed")
    plan = json.loads((tmp_path / "closed" / "plan.json").read_text())
    assert plan["remaining_decoder_parameters"] == closed.steps[1].decoder_parameters

    # the other bound in the same folder: what is known of the steps is known
    run_job(load_job(job, [bound]), out, quiet)
    assert folder_bytes(out / "model")["config.json"] != whole["config.json"]
    for name, content in folder_bytes(tmp_path / "closed" / "model").items():
        if name != "manifest.json":
            assert folder_bytes(out / "model")[name] == content
    run_job(load_job(job), tmp_path / "closed", quiet)
    opened = folder_bytes(tmp_path / "closed" / "model")
    assert opened == whole


def test_a_gate_that_nothing_passes_says_what_to_do(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = load_job(steps_job(make_job, make_model()), ["method.gate.agreement=0.999"])
    for _ in range(2):
        with pytest.raises(
            SpecError, match=r"step 1 of 3 \(10.0%\): agreement 0\.\d+, at least"
        ) as told:
            run_job(job, tmp_path / "run", quiet)
        assert "loosen the bound" in str(told.value)
    assert not (tmp_path / "run" / "model").exists()


def test_a_stop_at_every_stage_gives_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """One attempt after the other, each stopped at the first stage that none was stopped at."""
    job = load_job(steps_job(make_job, make_model(num_hidden_layers=2)))
    run_job(job, tmp_path / "calm", quiet)
    met: set[tuple[Any, ...]] = set()

    def stop(told: dict[str, Any]) -> None:
        key = told.get("scope"), told.get("stage")
        if told["event"] in ("stage-started", "step-measured") and key not in met:
            met.add(key)
            raise KeyboardInterrupt

    interrupted = True
    while interrupted:
        try:
            run_job(job, tmp_path / "cut", stop)
            interrupted = False
        except KeyboardInterrupt:
            pass
    assert len(met) > 12
    assert folder_bytes(tmp_path / "cut" / "model") == folder_bytes(tmp_path / "calm" / "model")
    verify_run(tmp_path / "cut")


def test_steps_that_are_met_already_are_left_out(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    overrides = ["method.schedule=[0.2, 0.21, 0.4]", "method.steps=null", "budget.sparsity=0.4"]
    model = make_model()
    job = load_job(steps_job(make_job, model, budget={"round_to": 8}), overrides)
    plan = plan_job(job, open_checkpoint(model))
    assert [step.number for step in plan.steps] == [1, 3]
    assert ["step 2 of 3 (21.0%) is left out" in warning for warning in plan.warnings] == [True]
    report = run_job(job, tmp_path / "run", quiet)
    assert [step.number for step in report.steps] == [1, 3]
    assert report.warnings == plan.warnings
    verify_run(tmp_path / "run")


def test_a_recovered_step_is_what_the_next_one_prunes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    recover = TRAINING | {"loss": "distillation"}
    (tmp_path / "other.txt").write_text("What a model says of a text that it has not seen. " * 40)
    evaluation = {"path": "other.txt", "window": 16, "max_windows": 2, "prompts": ["a"]}
    job = load_job(
        steps_job(make_job, make_model(), recover=recover, evaluation=evaluation),
        ["method.steps=2", "method.keep_steps=true"],
    )
    report = run_job(job, tmp_path / "run", quiet)
    assert [step.model for step in report.steps] == [
        f"tasks/step-0{number}/recover/model" for number in (1, 2)
    ]
    first, second = (
        read_manifest(tmp_path / "run" / "tasks" / f"step-0{n}" / "recover") for n in (1, 2)
    )
    assert first is not None
    assert second is not None
    teachers = {manifest.made_from["inputs"]["teacher"] for manifest in (first, second)}  # type: ignore[index]
    assert len(teachers) == 1, "the original teaches every step"
    source = read_manifest(tmp_path / "run" / "tasks" / "step-02" / "source")
    assert source is not None
    assert source.made_from["inputs"]["path"] == str(tmp_path / "run" / str(report.steps[0].model))  # type: ignore[index]
    weights = "layer-0000.safetensors"
    assert (report.model / weights).read_bytes() == (
        tmp_path / "run" / str(report.steps[1].model) / weights
    ).read_bytes()
    assert report.recovered_model is None
    checked = verify_run(tmp_path / "run")
    changed = job.model_copy(update={"cluster": job.cluster.model_copy(update={"wait_seconds": 7})})
    run_job(changed, tmp_path / "run", quiet)
    assert verify_run(tmp_path / "run") == checked, "steps that are found count too"


def test_the_last_step_spreads_the_budget_over_the_layers(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weight of the divergence that was asked for."""
    seen: list[Any] = []
    cheapest = allocate.cheapest

    def noted(budget: Any, losses: Any) -> Any:
        seen.append(losses)
        return cheapest(budget, losses)

    monkeypatch.setattr(allocate, "cheapest", noted)
    curves = {"name": "curves", "samples": 2, "levels": 4, "influence": 0.5}
    budget = {"per_layer": True, "allocation": curves}
    job = load_job(steps_job(make_job, make_model(), budget=budget), ["method.steps=2"])
    report = run_job(job, tmp_path / "run", quiet)
    assert report.narrowest != report.shape
    assert report.allocation is not None
    assert report.allocation["name"] == "curves"
    assert report.decoder_parameters.ratio <= 0.7
    run_job(
        load_job(
            steps_job(make_job, Path(job.model.path), budget=budget),
            ["method.steps=2", "budget.allocation.influence=1"],
        ),
        tmp_path / "whole",
        quiet,
    )
    for half, whole in zip(seen[0], seen[1], strict=True):
        curve = whole["neurons"]
        ratios = [half["neurons"][count] / loss for count, loss in curve.items() if loss]
        assert ratios == pytest.approx([ratios[0]] * len(ratios)), "curves of the same form"
        alone = ratios[0] ** -2  # d^0.5 e / e0 over d e / e0
        assert any(loss == pytest.approx(alone) for loss in curve.values())


def test_the_plan_speaks_of_what_comes_of_the_last_step(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model()
    for schedule in ("[0.17, 0.4]", "[0.1, 0.25, 0.4]"):
        words = [f"method.schedule={schedule}", "method.steps=null", "budget.sparsity=0.4"]
        job = load_job(steps_job(make_job, model, budget={"round_to": 3}), words)
        once = load_job(steps_job(make_job, model, budget={"round_to": 3}),
                        ["method=stat", "budget.sparsity=0.4"])  # fmt: skip
        plan, single = (plan_job(each, open_checkpoint(model)) for each in (job, once))
        assert plan.shapes[0].kept == single.shapes[0].kept
        assert (plan.sizes, plan.fallbacks) == (single.sizes, single.fallbacks)


def test_the_plan_counts_all_steps(make_model: MakeModel, make_job: MakeJob) -> None:
    model = make_model()
    path = steps_job(make_job, model)
    job, checkpoint = load_job(path), open_checkpoint(model)
    plan = plan_job(job, checkpoint)
    kept = plan_job(load_job(path, ["method.keep_steps=true"]), checkpoint)
    sizes = [step.output_bytes for step in plan.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert still_needed(kept.disk, ()) == sum(sizes)
    assert still_needed(plan.disk, ()) == sizes[0] + sizes[1]
    assert still_needed(plan.disk, {"step-01/gate"}) == sizes[1]
    single = plan_job(load_job(path, ["method=stat"]), checkpoint)
    flops = {stage.name: stage.flops for stage in plan.stages}
    once = {stage.name: stage.flops for stage in single.stages}
    assert once["forward"] < flops["forward"] < 3 * once["forward"]
    assert flops["gate"] > 0
    assert "gate" not in once
    assert {"gate"} == plan.needs.memory_by_step.keys() - single.needs.memory_by_step.keys()
    taught = ["recover.batch=1", "recover.teacher_top=4"]
    asked = [
        {stage.name: stage.flops for stage in plan_job(load_job(path, words), checkpoint).stages}
        for words in (taught, ["method=stat", *taught])
    ]
    assert asked[0]["teacher"] == asked[1]["teacher"]  # once for all steps
    with pytest.raises(SpecError, match=r"step 2 of 3 \(60.0%\): "):
        plan_job(load_job(path, ["budget.sparsity=0.9"]), checkpoint)
