"""Recovery by distillation: on a text of its own, from a teacher that has spoken before, judged on
windows that are held out; and its control, the dense model trained likewise.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayprune.orchestrator.execution.run_folder import read_events
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.preflight import check_job
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages import reported
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.training import LoraSpec, RecoverSpec
from rayprune.workers.passes import teaching
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import task_folder
from rayprune.workers.store.training_stage import read_log, settled
from rayprune.workers.tokens import check_tokens
from rayprune.workers.training.loop import Training
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet

LENGTH, TOP = 24, 8
OWN: dict[str, Any] = {"calibration": {"own": {"length": 64}}}
LAYERS: dict[str, Any] = {"sparsity": 0.4, "round_to": "auto"}
RECOVER: dict[str, Any] = {
    "batch": 4,
    "epochs": 2,
    "learning_rate": 3e-3,
    "checkpoint_steps": 2,
    "teacher_top": TOP,
    "held_out": {"windows": 2, "every": 3},
}


@pytest.fixture
def job(make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path) -> JobSpec:
    """A job that recovers on two texts of its own, 10 windows of each: 16 are trained on."""
    whole = text_file.read_text(encoding="utf-8")
    for name, part in (("one", slice(20_000, 30_000)), ("two", slice(30_000, 40_000))):
        (tmp_path / f"{name}.txt").write_text(whole[part], encoding="utf-8")
    text = {"path": "one.txt", "mix": [{"path": "two.txt"}]}
    text |= {"samples": 20, "sequence_length": LENGTH}
    model = make_model(num_hidden_layers=2)
    return load_job(make_job(model, recover=RECOVER | {"text": text}, budget={"kv_groups": 1}))


def changed(job: JobSpec, **options: Any) -> JobSpec:
    document = job.model_dump(mode="json")
    document["recover"] |= options
    return JobSpec.model_validate(document)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def done(run: Path, after: int = 0) -> set[str]:
    found = [event["task"] for event in read_events(run) if event["event"] == "task-done"]
    return set(found[after:])


def test_another_text_makes_nothing_of_the_pruning_anew(job: JobSpec, tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = run_job(job, run, quiet)
    teacher = read_manifest(task_folder(run, "teacher"))
    assert teacher is not None
    assert len(teacher.files) == 20
    sizes = {record.bytes for record in teacher.files.values()}
    assert max(sizes) < 8 * TOP * LENGTH + 1000
    log = read_log(task_folder(run, "recover"))
    assert len(log) == 2 * 16 // 4
    measured = [line["held_out"] for line in log]
    assert measured[0] == measured[1] != measured[2] == measured[3] == measured[4] != measured[5]
    assert "held_out" in report.training["recover"].curves
    assert report.recovery is not None
    assert report.recovery["samples"] == 20
    verify_run(run)
    before = len([e for e in read_events(run) if e["event"] == "task-done"])
    assert job.recover is not None
    assert job.recover.text is not None
    other = job.recover.text.model_copy(update={"samples": 16}).model_dump(mode="json")
    run_job(changed(job, text=other), run, quiet)
    assert done(run, before) == {"recovery-tokens", "teacher", "recover"}


def test_the_best_state_is_the_result_and_patience_ends_a_training(
    job: JobSpec, tmp_path: Path
) -> None:
    """At a rate that ruins the model nothing is better than its beginning, whose bits come back."""
    run, looked_at = tmp_path / "run", {"windows": 2, "every": 1, "patience": 2}
    run_job(changed(job, learning_rate=1.0, warmup=0.0, held_out=looked_at), run, quiet)
    assert len(read_log(task_folder(run, "recover"))) == 2
    pruned, recovered = weights(run / "model"), weights(task_folder(run, "recover") / "model")
    assert all(torch.equal(tensor, recovered[name]) for name, tensor in pruned.items())


def interrupted(whole: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """A function that is interrupted in one of its calls."""
    left = [calls]

    def dies(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    return dies


@pytest.mark.slow
def test_a_recovery_that_was_cut_off_ends_with_the_same_bytes(
    job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the teacher's windows, and of the training, behind its best state so far."""
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    run_job(job, calm, quiet)
    for place, name, whole, calls in (
        (teaching, "write_sealed", teaching.write_sealed, 7),
        (Training, "_step", Training._step, 6),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted(whole, calls))
            with pytest.raises(KeyboardInterrupt):
                run_job(job, cut, quiet)
        left = len(list(task_folder(cut, "teacher").glob("window-*")))
        assert left == (6 if place is teaching else 20)
    run_job(job, cut, quiet)
    for folder in ("model", "tasks/recover/model"):
        assert folder_bytes(cut / folder) == folder_bytes(calm / folder)
    results = [json.loads((run / "tasks/recover/result.json").read_text()) for run in (calm, cut)]
    assert results[0]["held_out"] == results[1]["held_out"]


@pytest.mark.slow
def test_the_control_is_the_dense_model_trained_likewise(
    job: JobSpec, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    document = job.model_dump(mode="json")
    del document["budget"]
    (tmp_path / "other.txt").write_text(text_file.read_text(encoding="utf-8")[40_000:44_000])
    document["evaluation"] = {"path": str(tmp_path / "other.txt"), "window": 32, "max_windows": 4}
    document["method"] = {"name": "none"}
    document["recover"] |= {"loss": "lm", "teacher_top": None}
    run = tmp_path / "run"
    report = run_job(JobSpec.model_validate(document), run, quiet)
    dense = weights(Path(job.model.path))
    assert {name: tensor.equal(dense[name]) for name, tensor in weights(run / "model").items()} == (
        dict.fromkeys(dense, True)
    )
    assert report.parameters.before == report.parameters.after
    assert report.perplexity is not None
    assert report.perplexity.after == pytest.approx(report.perplexity.before)
    assert report.closeness["after"].divergence == pytest.approx(0.0, abs=1e-6)
    assert report.closeness["recovered"].divergence > 0
    card = (run / "tasks/recover/model/README.md").read_text()
    assert "as it is, written by rayprune" in card
    assert "It was trained on 20 windows of 24 tokens of one.txt, two.txt." in card
    verify_run(run)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "none"}}, "nothing is trained: add recover"),
        ({"method": {"name": "none"}, "recover": {}}, "method none removes nothing; leave out bu"),
        ({"recover": {"loss": "lm", "teacher_top": 4}}, "teacher_top with loss: lm"),
        ({"recover": {"hidden": 1.0, "teacher_top": 4}}, "hidden beside teacher_top"),
        ({"recover": {"scope": "layer", "loss": "lm"}}, "loss with scope: layer"),
        ({"recover": {"scope": "layer", "hidden": 1.0}}, "hidden with scope: layer"),
        ({"recover": {"scope": "layer", "teacher_top": 4}}, "teacher_top with scope: layer"),
        (
            {"recover": {"scope": "layer", "activation_checkpointing": False}},
            "activation_checkpointing with scope: layer",
        ),
        ({"recover": {"samples": 4, "text": {"path": "x.txt"}}}, "samples beside text"),
        ({"recover": {"held_out": {"windows": 16}}}, "reads 16 of this one; lower recover.held_"),
        ({"recover": {"teacher_top": 5000}}, "teacher_top: 5000, but the model has"),
        (OWN | {"recover": {"samples": 1}}, r"none of the 1 samples; raise .* or recover\.samples"),
        (
            OWN | {"method": {"name": "dress", "training": {"samples": 1}}},
            r"none of the 1 samples; raise .* or method\.training\.samples",
        ),
        (
            OWN | {"method": {"name": "trsp", "gates": {"samples": 1}}, "budget": LAYERS},
            r"none of the 1 samples; raise .* or method\.gates\.samples",
        ),
    ],
)
def test_what_cannot_be_recovered_is_refused(
    sections: dict[str, Any], message: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    with pytest.raises(SpecError, match=message):
        check_job(load_job(make_job(make_model(), **sections)))


def test_what_a_reader_raises_ends_a_training(
    job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of it, though another thread tells its steps."""
    monkeypatch.setattr(reported, "REPORT_SECONDS", 0.01)
    slow, steps = Training._step, list[int]()

    def step(self: Training, number: int, numbers: Any) -> dict[str, float]:
        steps.append(number)
        time.sleep(0.3)
        return slow(self, number, numbers)

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "training-step":
            raise ValueError("enough")

    monkeypatch.setattr(Training, "_step", step)
    long = changed(job, epochs=20, teacher_top=None, held_out=None)
    with pytest.raises(ValueError, match="enough"):
        run_job(long, tmp_path / "run", show)
    assert len(steps) < 20, "of a hundred"


def test_rates_fall_with_the_root_of_the_size() -> None:
    adapters, whole = RecoverSpec(lora=LoraSpec()), RecoverSpec()
    rates = [settled(adapters, size).learning_rate for size in (10**6, 135 * 10**6, 540 * 10**6)]
    assert rates == [1e-3, 1e-3, 5e-4]
    assert settled(whole, 540 * 10**6).learning_rate == pytest.approx(1.5e-4)
    assert settled(RecoverSpec(learning_rate=0.5), 10**12).learning_rate == 0.5


def test_a_model_is_not_judged_by_its_recovery_text(job: JobSpec, tmp_path: Path) -> None:
    document = job.model_dump(mode="json")
    (tmp_path / "part.txt").write_text((tmp_path / "two.txt").read_text()[:500])
    document["evaluation"] = {"texts": {"part": {"path": str(tmp_path / "part.txt")}}, "window": 64}
    document["recover"]["text"] |= {"sequence_length": 64, "samples": 40}
    found = (
        r"evaluation\.texts\.part\.path: .* stand in the windows for calibration or training too"
    )
    with pytest.raises(SpecError, match=found):
        run_job(JobSpec.model_validate(document), tmp_path / "run", quiet)


def test_without_a_text_it_trains_on_the_calibration_s_own_text_included(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    """1:1, from a text that has half of the windows and no more."""
    (tmp_path / "half.txt").write_text(text_file.read_text(encoding="utf-8")[: 6 * 32 + 8])
    own = {"length": 32, "batch": 8}
    texts = {"path": "half.txt", "samples": 12, "sequence_length": 32, "shards": 4, "own": own}
    recover = {"batch": 5, "held_out": {"windows": 1}}
    sections = {"calibration": texts, "recover": recover, "budget": {"kv_groups": 1}}
    job = load_job(make_job(make_model(num_hidden_layers=2), **sections))
    check_tokens(job)
    run = tmp_path / "run"
    report = run_job(job, run, quiet)
    tokens = [
        load_file(task_folder(run, f"{name}-tokens") / "tokens.safetensors")["tokens"]
        for name in ("calibration", "recovery")
    ]
    assert torch.equal(*tokens)
    assert len(tokens[0]) == 12
    assert len(read_log(task_folder(run, "recover"))) == 10 // 5
    assert report.recovery is not None
    assert "half.txt, the model's own text." in (run / "tasks/recover/model/README.md").read_text()
    verify_run(run)
