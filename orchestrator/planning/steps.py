"""Several passes over a model, planned: the job of each, and what all of them take together."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace

from rayprune.orchestrator.planning.causal import check_encoder
from rayprune.orchestrator.planning.costs import Traffic
from rayprune.orchestrator.planning.disk import DiskNeed, still_needed
from rayprune.orchestrator.planning.memory_choice import MemoryNeeds
from rayprune.orchestrator.planning.own_text import own_tasks
from rayprune.orchestrator.planning.plan import (
    Plan,
    PlannedStep,
    make_plan,
    recovery_text,
    teacher_tasks,
)
from rayprune.orchestrator.planning.timing import Stage
from rayprune.orchestrator.planning.worker_memory import total
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
    SOURCE_TASK,
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
    most KV groups.

    Raises:
        RaypruneError: as `make_plan` says.
    """
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
        try:
            plan = make_plan(spec, model, machine, device, steps.gate.samples)
        except (SpecError, ResourceError) as error:
            raise type(error)(f"{step_words(steps, number)}: {error}") from None
        plans[number] = plan
        if number < len(steps.sparsities):
            model = model.planned_cut(plan.shapes[0].kept, job.export.form, job.export.dtype)
    return _together(job, steps, plans).noting(skipped)


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


def relative_sparsity(sparsity: float, original: int, current: int) -> float:
    """The fraction of `current` parameters whose removal leaves at most the part `1 - sparsity` of
    the `original` ones; not above 0 where no more are left.

    Half a parameter is let go of, so that no rounding decides about one that is whole.
    """
    most = math.floor((1 - sparsity) * original + 1e-6)
    return 1 - (most + 0.5) / current


def step_words(steps: InSteps, number: int) -> str:
    """A pass as it is called in errors and warnings."""
    return f"step {number} of {len(steps.sparsities)} ({steps.sparsities[number - 1]:.1%})"


def nothing_to_remove(steps: InSteps, number: int) -> str:
    """The warning of a pass that is left out."""
    return (
        f"{step_words(steps, number)} is left out: what the step before leaves meets it already;"
        " take fewer method.steps, or lower budget.round_to"
    )


def _together(job: JobSpec, steps: InSteps, plans: dict[int, Plan]) -> Plan:
    """The first pass, the dearest, with what all of them take."""
    first, last = (list(plans.values())[place] for place in (0, -1))
    evaluated = (EVALUATION_TASK, "evaluate-before", "evaluate-after") if job.evaluation else ()
    return replace(
        first,
        shapes=last.shapes,
        speeds=last.speeds,
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
            *(task for task in first.tasks if task.startswith(samples_task(""))),
        ),
        needs=_needs([plan.needs for plan in plans.values()]),
        stages=tuple(_stages(list(plans.values()))),
        seconds=_sum([plan.seconds for plan in plans.values()]),
        seconds_with_layers=None,
        traffic=Traffic(*map(sum, zip(*(astuple(p.traffic) for p in plans.values()), strict=True))),
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


def _needs(needs: Sequence[MemoryNeeds]) -> MemoryNeeds:
    """The most that any pass needs."""
    by_step: dict[str, dict[str, int]] = {}
    for need in needs:
        for name, kinds in need.memory_by_step.items():
            by_step[name] = max(by_step.get(name, {}), kinds, key=total)
    fewest = [need.fewest_workers for need in needs]
    keeping = [need.fewest_workers_keeping_all for need in needs]
    return MemoryNeeds(
        memory_limit_bytes=needs[0].memory_limit_bytes,
        memory_by_step=by_step,
        worker_memory_bytes=max(need.worker_memory_bytes for need in needs),
        host_memory_bytes=max(need.host_memory_bytes for need in needs),
        fewest_workers=None if None in fewest else max(n for n in fewest if n),
        fewest_workers_keeping_all=None if None in keeping else max(n for n in keeping if n),
    )


def _stages(plans: Sequence[Plan]) -> Iterator[Stage]:
    """The stages of all passes, by name; each is bound by what bounds the longest of its own."""
    for name in dict.fromkeys(stage.name for plan in plans for stage in plan.stages):
        own = [stage for plan in plans for stage in plan.stages if stage.name == name]
        longest = max(own, key=lambda stage: stage.seconds or 0.0)
        seconds = _sum([stage.seconds for stage in own])
        yield Stage(name, sum(stage.flops for stage in own), seconds, longest.bound_by)


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if known else None


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
