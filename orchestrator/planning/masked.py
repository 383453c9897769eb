"""Units that go before zeros are made, in one budget: the job of each of the two passes, and what
both take.
"""

from dataclasses import replace

from rayprune.orchestrator.planning.disk import DiskNeed
from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.planning.shapes import open_shapes
from rayprune.orchestrator.planning.together import (
    needs_together,
    seconds_together,
    stages_together,
    traffic_together,
)
from rayprune.specs.budget import BudgetSpec
from rayprune.specs.errors import SpecError
from rayprune.specs.job import CorrectionSpec, JobSpec
from rayprune.specs.machine import MachineProfile
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.sites import check_widths
from rayprune.workers.store.layout import EXPORT_TASK, SOURCE_TASK, WIDTHS


def widths_job(job: JobSpec) -> JobSpec:
    """The job of the first pass: the inner method cuts, and the result is written in the form that
    is asked for, in the types of the original.
    """
    own = [target for target in job.export.target if target not in job.converted]
    export = {"target": tuple(own or ["transformers"]), "dtype": "auto"}
    changes = {"export": job.export.model_copy(update=export), "evaluation": None}
    return job.model_copy(update={"method": job.method.cuts_first, **changes})


def zeros_job(job: JobSpec) -> JobSpec:
    """The job of the second pass: zeros in the matrices that the first has left."""
    return job.model_copy(
        update={
            "method": job.method.model_copy(update={"inner": None}),
            "budget": BudgetSpec(),
            "correction": CorrectionSpec(),
        }
    )


def plan_masked(
    job: JobSpec, checkpoint: Checkpoint, machine: MachineProfile | None, device: str | None
) -> Plan:
    """Plan the units that go, so that they and the zeros together meet the budget, and the zeros.

    Raises:
        RaypruneError: as `make_plan` says.
    """
    if reason := checkpoint.model.not_pruned:
        raise SpecError(
            f"method {job.method.name}: a model that is only planned ({reason}) is planned for one"
            " pass; leave out method.inner"
        )
    shapes = open_shapes(job, checkpoint)
    masks, form = job.method.masks, job.export.form
    assert masks is not None
    narrower = [checkpoint.planned_cut(shape.kept, form, "auto") for shape in shapes]
    for model in narrower:
        check_widths(model.model, masks)
    widths = job.model_copy(update={"method": job.method.cuts_first})
    first = make_plan(widths, checkpoint, machine, device, given=shapes)
    own = job.calibration.model_copy(update={"own": None})  # it is written once
    zeros = zeros_job(job).model_copy(update={"calibration": own, "evaluation": None})
    second = make_plan(zeros, narrower[0], machine, device)
    plans = [first, second]
    return replace(
        first,
        tasks=_tasks(first, second),
        memory=replace(first.memory, spill_hidden=any(p.memory.spill_hidden for p in plans)),
        needs=needs_together([plan.needs for plan in plans]),
        stages=tuple(stages_together(plans)),
        seconds=seconds_together([plan.seconds for plan in plans]),
        seconds_with_layers=None,
        traffic=traffic_together(plans),
        output_bytes=second.output_bytes,
        disk=(DiskNeed(f"{WIDTHS}/{EXPORT_TASK}", narrower[0].bytes_on_disk), *second.disk),
        zeros=second.zeros,
        notes=(*first.notes, *second.notes),
    )


def _tasks(first: Plan, second: Plan) -> tuple[str, ...]:
    """The first pass's tasks between source and export in a scope of their own, the second's in
    their place.
    """
    cut, made = (
        plan.tasks[plan.tasks.index(SOURCE_TASK) + 1 : plan.tasks.index(EXPORT_TASK) + 1]
        for plan in (first, second)
    )
    before, after = first.tasks.index(SOURCE_TASK) + 1, first.tasks.index(EXPORT_TASK) + 1
    scoped = (f"{WIDTHS}/{task}" for task in cut)
    return (*first.tasks[:before], *scoped, *made, *first.tasks[after:])
