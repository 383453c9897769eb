"""After how long a worker counts as hung."""

from pathlib import Path

import pytest

from rayprune.orchestrator.planning.patience import LEAST_SECONDS, SLOWEST, step_limit
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel


def test_what_the_job_says_counts(make_model: MakeModel, make_job: MakeJob) -> None:
    job = load_job(make_job(make_model()), ["parallel.step_seconds=7"])
    plan = make_plan(job, open_checkpoint(Path(job.model.path)))
    assert step_limit(job, plan) == 7


def test_by_itself_it_grows_with_the_work(make_model: MakeModel, make_job: MakeJob) -> None:
    model, file = make_model(), make_job
    limits = []
    for settings in (
        [],
        ["calibration.samples=160"],
        ["calibration.samples=160", "recover.epochs=1"],
        ["calibration.samples=160", "recover.epochs=9"],
    ):
        job = load_job(file(model), settings)
        plan = make_plan(job, open_checkpoint(model))
        flops = sum(stage.flops for stage in plan.stages if stage.name != "recover")
        limits.append(step_limit(job, plan))
        assert limits[-1] >= LEAST_SECONDS + flops / SLOWEST["cpu"]
    assert limits[0] < limits[1] < limits[2]  # by a step of the training, which is logged
    assert limits[2] == pytest.approx(limits[3])
