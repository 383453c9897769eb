"""Units that go before zeros, in one budget: the bytes of two runs, one after the other, and as
many as are asked for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.reporting.plan_view import plan_parts
from rayprune.orchestrator.reporting.report import Report, summary
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.files import remove_task
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

SMALL = {"samples": 4, "sequence_length": 32, "shards": 2}
BOTH = {"name": "sparse", "inner": "stat"}
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "head_dim": 32,
    "dtype": torch.bfloat16,
}
"""Of sizes that a GPU holds without the zeros."""


def ran(job: Path, out: Path, *changes: str, **options: Any) -> Report:
    return run_job(load_job(job, list(changes)), out, options.get("show", quiet))


def planned(job: Path, *changes: str) -> Plan:
    spec = load_job(job, list(changes))
    return plan_job(spec, open_checkpoint(Path(spec.model.path)))


def words(parts: Any) -> str:
    return "\n".join(part for part in parts if isinstance(part, str))


def model_bytes(run: Path) -> dict[str, bytes]:
    own = ("README.md", "manifest.json")
    return {n: data for n, data in folder_bytes(run / "model").items() if n not in own}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_job_gives_the_bytes_of_two(
    family: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model, out = make_model(family), tmp_path / "both"
    text = tmp_path / "other.txt"
    text.write_text("Units go, then weights become zero; what is left is another model. " * 20)
    evaluation = {"path": str(text), "window": 16, "max_windows": 2, "prompts": ["a"]}
    budget = {"sparsity": 0.3, "round_to": 8}
    sections = {"calibration": SMALL, "budget": budget, "method": BOTH, "evaluation": evaluation}
    job = make_job(model, **sections)
    plan, both = planned(job), ran(job, out)
    verify_run(out)
    widths = ran(make_job(model, "a.yaml", calibration=SMALL, budget=budget), tmp_path / "widths")
    whole = {"sparsity": None, "round_to": "auto"}
    zeros = make_job(
        tmp_path / "widths/model",
        "b.yaml",
        calibration=SMALL,
        budget=whole,
        method={"name": "sparse"},
    )
    second = ran(zeros, tmp_path / "zeros")
    assert model_bytes(out) == model_bytes(tmp_path / "zeros")
    assert both.decoder_parameters == widths.decoder_parameters
    assert both.zeros == second.zeros
    assert [
        {**a.groups, **b.groups} for a, b in zip(widths.layers, second.layers, strict=True)
    ] == [layer.groups for layer in both.layers]
    part = both.zeros / both.decoder_parameters.before
    gone = 1 - both.decoder_parameters.ratio
    assert f"{gone:.1%} of the decoder parameters removed, {part:.1%} of the d" in both.done
    assert f"weights are zero: {both.done}" in words(summary(both))
    card = (out / "model/README.md").read_text()
    assert f"without {gone:.1%} of the parameters of its layers and with {part:.1%} of" in card
    assert "`method: sparse`, `inner: stat`" in card
    done = json.loads((out / "plan.json").read_text())
    assert done["shapes"][0]["decoder_parameters"] == both.decoder_parameters.after
    assert plan.zeros == both.zeros or len(plan.shapes) > 1
    assert all((out / "tasks" / t / "manifest.json").exists() for t in plan.tasks if t != "export")
    assert "zeros in matrices that keep their size" in words(plan_parts(plan))


def test_widths_give_what_zeros_leave_of_the_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """The widest FFN with which the weights, 2:4 matrices counted with 9/16, keep the budget."""
    model, out = make_model(**WIDE), tmp_path / "run"
    dense = sum(info.num_bytes for info in open_checkpoint(model).tensors.values())
    asked = int(0.6 * dense)
    budget = {
        "sparsity": None,
        "round_to": 64,
        "kv_groups": open_checkpoint(model).model.units["heads"],
        "memory": {"bytes": asked, "context": 0},
    }
    job = make_job(model, calibration=SMALL, budget=budget, method=BOTH)
    plan, report = planned(job), ran(job, out)
    about = json.loads((out / "model/sparsity.json").read_text())
    files = (out / "model").glob("*.safetensors")
    weights = {name: w for file in files for name, w in load_file(file).items()}
    held = sum(
        w.nbytes * 9 // 16 if name in about["tensors"] else w.nbytes for name, w in weights.items()
    )
    assert report.served_bytes is not None
    assert plan.shape.memory_bytes == report.served_bytes.after == held <= asked
    step = sum(w.nbytes * 9 // 16 for n, w in weights.items() if "mlp" in n)
    assert held + step * 64 // plan.shape.kept["neurons"] > asked
    assert plan.shape.kept["neurons"] < 256
    assert "2:4 matrices without" in (out / "model/README.md").read_text()
    for change in ("method.sites=[down]", "method.pattern=4:8"):
        assert planned(job, change).shape.kept["neurons"] < plan.shape.kept["neurons"]
    with pytest.raises(SpecError, match=r"raise budget\.memory\.bytes"):
        planned(job, "export.dtype=float32")
    with pytest.raises(SpecError, match="with its zeros the model meets every target"):
        planned(job, f"budget.memory.bytes={dense}")


def test_a_run_goes_on_to_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """After a stop anywhere, and with what a changed option of the zeros leaves of it."""
    options = {"calibration": SMALL, "budget": {"sparsity": 0.3, "kv_groups": 2}, "method": BOTH}
    job = make_job(make_model(num_hidden_layers=2), **options)
    ran(job, tmp_path / "whole")
    for task in ("widths/layer-0000", "widths/export", "layer-0000"):

        def stop(event: dict[str, Any], task: str = task) -> None:
            done = event["event"] in ("task-done", "step-finished", "stage-finished")
            if done and (tmp_path / "cut/tasks" / task / "manifest.json").exists():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ran(job, tmp_path / "cut", show=stop)
    ran(job, tmp_path / "cut")
    remove_task(tmp_path / "cut/tasks/widths/export")
    ran(job, tmp_path / "cut")
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    events: list[dict[str, Any]] = []
    ran(job, tmp_path / "cut", "method.damping=0.1", show=events.append)
    stale = [event["task"] for event in events if event["event"] == "task-stale"]
    assert stale[0] == "layer-0000"
    assert not any(task.startswith("widths/") for task in stale)
    assert model_bytes(tmp_path / "cut") != model_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_make_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model(), calibration=SMALL, budget={"sparsity": 0.3}, method=BOTH)
    ran(job, tmp_path / "one")
    ran(job, tmp_path / "two", "cluster.executor=ray", "parallel.workers=2")
    assert model_bytes(tmp_path / "one") == model_bytes(tmp_path / "two")


REFUSED = {
    "budget.per_layer=true": "leave out budget.per_layer",
    "budget.drop_layers=1": "has a way of its own",
    "recover={}": "leave out recover",
    "export.pad=true": "all layers are alike; leave it out",
    "parallel.placement=layers": "leave out parallel.placement: layers",
    "method.inner=dress": "method.inner",
    "budget={latency_ms: 1, latency_table: table.yaml}": "leave out budget.latency_table",
    "budget={memory: {bytes: 1MB, context: 0, batch: 2}}": "batch: 2 sequences of context 0",
    "budget.round_to=2": "no multiple of 4",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_has_no_effect_or_cannot_be_is_refused(
    change: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    job = make_job(make_model(), budget={"sparsity": 0.25, "kv_groups": 2}, method=BOTH)
    with pytest.raises(SpecError) as refused:
        planned(job, change)
    assert REFUSED[change] in str(refused.value)
