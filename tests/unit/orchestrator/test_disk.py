"""Room on disk for everything a run writes: the pruned model, trained ones, saved states."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rayprune.orchestrator.planning.disk import DiskNeed, disk_needs, still_needed
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.planning.workload import TrainingLoad
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ResourceError
from rayprune.specs.loader import load_job
from rayprune.specs.training import TrainingSpec
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.layout import EXPORT_TASK, RECOVER_TASK, REGULARISE_TASK, TEACHER_TASK
from rayprune.workers.store.training_stage import saved_states
from tests.conftest import MakeJob, MakeModel
from tests.unit.orchestrator.workloads import LOAD

PARAMETERS = 800 + 6 * 300
FIRST = TrainingLoad(1, False, 4, 16, task=REGULARISE_TASK, saved_states=2)
RECOVERY = TrainingLoad(1, False, 4, 16, task=RECOVER_TASK, saved_states=1)


def test_without_trainings_it_is_the_pruned_model() -> None:
    assert disk_needs(LOAD) == (DiskNeed(EXPORT_TASK, LOAD.output_bytes),)


def test_trainings_leave_models_and_have_states_meanwhile() -> None:
    first, pruned, recovered = disk_needs(replace(LOAD, trainings=(FIRST, RECOVERY)))
    assert first == DiskNeed(REGULARISE_TASK, LOAD.bytes_on_disk, 2 * 12 * PARAMETERS)
    assert pruned == DiskNeed(EXPORT_TASK, LOAD.output_bytes)
    assert recovered == DiskNeed(RECOVER_TASK, LOAD.output_bytes, 12 * LOAD.output_bytes // 2)
    (alone, _) = disk_needs(replace(LOAD, trainings=(replace(FIRST, each_layer=True),)))
    assert alone.meanwhile_bytes == 2 * 12 * 300 * LOAD.workers
    kinds = tuple(replace(kind, matrix_sides=50) for kind in LOAD.kinds)
    adapters = replace(RECOVERY, lora_rank=3)
    (_, lora) = disk_needs(replace(LOAD, kinds=kinds, trainings=(adapters,)))
    assert lora.meanwhile_bytes == 12 * 3 * 6 * 50
    taught = replace(RECOVERY, taught_windows=5, teacher_top=64, keeps_best=True)
    (_, teacher, best) = disk_needs(replace(LOAD, trainings=(taught,)))
    assert teacher == DiskNeed(TEACHER_TASK, 5 * 16 * 64 * 8)
    assert best.meanwhile_bytes == 16 * LOAD.output_bytes // 2


def test_what_is_finished_is_there_already() -> None:
    needs = (DiskNeed("a", 10, 100), DiskNeed("b", 20), DiskNeed("c", 20, 5))
    assert still_needed(needs, ()) == 110
    assert still_needed(needs, ("a",)) == 45
    assert still_needed(needs, ("a", "b")) == 25
    assert still_needed(needs, ("a", "b", "c")) == 0


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(50, 50, 0), (51, 50, 1), (100, 50, 1), (101, 50, 2), (9, 1, 2)],
)
def test_states_are_saved_between_steps(steps: int, every: int, expected: int) -> None:
    options = TrainingSpec(batch=1, checkpoint_steps=every)
    assert saved_states(options, steps) == expected


def test_a_recovery_that_does_not_fit_is_refused_at_the_start(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(num_hidden_layers=1)
    recover = {"batch": 1, "checkpoint_steps": 1}
    jobs = [
        load_job(make_job(model, **sections))
        for sections in ({"recover": recover}, {"recover": None})
    ]
    free = make_plan(jobs[0], open_checkpoint(model)).output_bytes + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ResourceError, match=r"\(export, recover\) needs \d+ bytes"):
        run_job(jobs[0], tmp_path / "refused", lambda _: None)
    run_job(jobs[1], tmp_path / "run", lambda _: None)
    with pytest.raises(ResourceError, match=r"written \(recover\) needs"):
        run_job(jobs[0], tmp_path / "run", lambda _: None)
