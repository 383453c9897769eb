"""Several passes over a model, planned: the job of each, and what all of them take together."""

from collections.abc import Iterator
from dataclasses import replace

from rayprune.orchestrator.planning.causal import check_encoder
from rayprune.orchestrator.planning.disk import DiskNeed, still_needed
from rayprune.orchestrator.planning.dropped import plan_dropping
from rayprune.orchestrator.planning.engines import fallbacks
from rayprune.orchestrator.planning.masked import plan_masked
from rayprune.orchestrator.planning.own_text import own_tasks
from rayprune.orchestrator.planning.plan import Plan, PlannedStep, make_plan
from rayprune.orchestrator.planning.rounding import told_of_sizes
from rayprune.orchestrator.planning.tasks import recovery_text, teacher_tasks
from rayprune.orchestrator.planning.together import (
    needs_together,
    of_stages,
    relative_sparsity,
    seconds_together,
    stages_together,
    traffic_together,
)
from rayprune.specs.allocation import UniformAllocation
from rayprune.specs.errors import ResourceError, SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.machine import MachineProfile
from rayprune.specs.methods.options import InSteps
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    EXPORT_TASK,
    GATE_TOKENS_TASK,
    LM_TASKS_TASK,
    SOURCE_TASK,
    TEACHER_TASK,
    converted_task,
    gate_task,
    samples_task,
)


def plan_job(
    job: JobSpec,
    checkpoint: Checkpoint,
    machine: MachineProfile | None = None,
    device: str | None = None,
) -> Plan:
    """Plan a job as `make_plan` does; of several passes, each over what the one before leaves with
    most KV groups; of whole layers that go before the rest; of units that go before zeros.

    Raises:
        RaypruneError: as `make_plan` says.
    """
    if job.budget.drop_layers is not None:
        return plan_dropping(job, checkpoint, machine, device)
    if job.method.cuts_first:
        return plan_masked(job, checkpoint, machine, device)
    if (steps := job.steps) is None:
        return make_plan(job, checkpoint, machine, device)
    if not checkpoint.model.causal:
        check_encoder(job)
    if reason := checkpoint.model.not_pruned:
        raise SpecError(
            f"method {job.method.name}: a model that is only planned ({reason}) is planned for one"
            f" pass; set method: {job.method.selector.name}"
        )
    plans: dict[int, Plan] = {}
    skipped: list[str] = []
    model = checkpoint
    for number in range(1, len(steps.sparsities) + 1):
        spec = step_job(job, number, checkpoint.decoder_parameters, model.decoder_parameters)
        if spec is None:
            skipped.append(nothing_to_remove(steps, number))
            continue
        if not plans:  # the dense model is judged beside the last one
            spec = spec.model_copy(update={"evaluation": job.evaluation})
        else:  # its own text is written once
            own = {"calibration": spec.calibration.model_copy(update={"own": None})}
            spec = spec.model_copy(update=own)
        try:
            gated = steps.gate.samples
            plan = make_plan(spec, model, machine, device, gated, original=checkpoint)
        except (SpecError, ResourceError) as error:
            raise type(error)(f"{step_words(steps, number)}: {error}") from None
        if plans:  # its teacher was asked for the first one
            plan = of_stages(plan, {stage.name for stage in plan.stages} - {TEACHER_TASK})
        plans[number] = plan
        if number < len(steps.sparsities):
            model = model.planned_cut(plan.shapes[0].kept, job.export.form, job.export.dtype)
    return _together(job, checkpoint, steps, plans).noting(skipped)


def step_job(job: JobSpec, number: int, original: int, current: int) -> JobSpec | None:
    """The job of a pass, counted from 1, over a model that has `current` of the `original` decoder
    parameters; None where it meets that pass's sparsity already.

    Layers are sized alike but in the last pass: a model whose layers differ is not pruned again.
    """
    steps = job.steps
    assert steps is not None
    relative = relative_sparsity(steps.sparsities[number - 1], original, current)
    if relative <= 0:
        return None
    budget: dict[str, object] = {"sparsity": relative}
    if number < len(steps.sparsities):
        budget |= {"per_layer": False, "allocation": UniformAllocation()}
    own = [target for target in job.export.target if target not in job.converted]
    return job.model_copy(
        update={
            "method": job.method.selector,
            "budget": job.budget.model_copy(update=budget),
            "export": job.export.model_copy(update={"target": tuple(own or ["transformers"])}),
            "evaluation": None,
        }
    )


def step_words(steps: InSteps, number: int) -> str:
    """A pass as it is called in errors and warnings."""
    return f"step {number} of {len(steps.sparsities)} ({steps.sparsities[number - 1]:.1%})"


def nothing_to_remove(steps: InSteps, number: int) -> str:
    """The warning of a pass that is left out."""
    return (
        f"{step_words(steps, number)} is left out: what the step before leaves meets it already;"
        " take fewer method.steps, or lower budget.round_to"
    )


def _together(job: JobSpec, dense: Checkpoint, steps: InSteps, plans: dict[int, Plan]) -> Plan:
    """The first pass, the dearest, with what all of them take, and what comes of the last."""
    first, last = (list(plans.values())[place] for place in (0, -1))
    evaluated = (EVALUATION_TASK, "evaluate-before", "evaluate-after") if job.evaluation else ()
    return replace(
        first,
        shapes=last.shapes,
        speeds=tuple(
            replace(speed, dense=whole.dense)
            for whole, speed in zip(first.speeds, last.speeds, strict=True)
        ),
        sizes=told_of_sizes(job, dense, last.shapes[0].decoder_parameters),
        fallbacks=fallbacks(dense.model, last.shapes, job.export.tensor_parallel),
        tasks=(
            *own_tasks(job),
            CALIBRATION_TASK,
            *recovery_text(job),
            GATE_TOKENS_TASK,
            SOURCE_TASK,
            *teacher_tasks(job),
            *map(gate_task, plans),
            EXPORT_TASK,
            *map(converted_task, job.converted),
            *evaluated,
            *_asked_of_models(first),
        ),
        needs=needs_together([plan.needs for plan in plans.values()]),
        stages=tuple(stages_together(list(plans.values()))),
        seconds=seconds_together([plan.seconds for plan in plans.values()]),
        seconds_with_layers=None,
        traffic=traffic_together(list(plans.values())),
        output_bytes=last.output_bytes,
        disk=tuple(_disk(plans, steps.keeps)),
        steps=tuple(
            PlannedStep(
                number,
                steps.sparsities[number - 1],
                plan.shapes,
                plan.seconds,
                plan.needs.worker_memory_bytes,
                plan.output_bytes,
            )
            for number, plan in plans.items()
        ),
    )


def _asked_of_models(first: Plan) -> Iterator[str]:
    """What the dense model and the last one are asked; a recovery is part of every pass."""
    for task in first.tasks:
        if task.startswith((samples_task(""), LM_TASKS_TASK)) and not task.endswith("recovered"):
            yield task


def _disk(plans: dict[int, Plan], keeps: bool) -> Iterator[DiskNeed]:
    """What the passes write; unless all are kept, the model before goes when the next one has
    passed. The run's own model is the last one under a second name.
    """
    before = 0
    for number, plan in plans.items():
        stays = sum(need.stays_bytes for need in plan.disk)
        more = stays if keeps else stays - before
        yield DiskNeed(gate_task(number), more, still_needed(plan.disk, ()) - more)
        before = stays
