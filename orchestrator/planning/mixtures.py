"""What a job may ask of a mixture of experts."""

from rayprune.specs.allocation import CurvesAllocation
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.description import Group


def kept_experts(job: JobSpec, checkpoint: Checkpoint) -> int:
    """Experts of a layer that stay, where layers may differ at most; 0 of a model without any.

    Raises:
        SpecError: there are not so many, a token is to pass through more, groups of experts could
            not lose alike, or the job asks for what is not done with experts.
    """
    asked, group = job.budget.experts, checkpoint.model.experts
    if group is None:
        name = "experts" if asked else "expert_score"
        if asked or job.budget.expert_score != "reap":
            raise SpecError(
                f"budget.{name}: no experts of model_type {checkpoint.model.model_type} can be"
                " removed; leave it out"
            )
        return 0
    _check_job(job)
    _check_count(asked or group.num_units, group)
    return asked or group.num_units


def _check_count(asked: int, group: Group) -> None:
    least = group.fewest
    if not least <= asked <= group.num_units:
        raise SpecError(
            f"budget.experts: {asked} of {group.num_units}; a token's choice needs at least"
            f" {least}, so give a number from {least} to {group.num_units}"
        )
    if asked % group.parts:
        raise SpecError(
            f"budget.experts: {asked}; the router chooses among {group.parts} groups of experts"
            f" first, which have to be of one size: give a multiple of {group.parts}"
        )


def _check_job(job: JobSpec) -> None:
    """Refuse what is not done with experts."""
    wrong = {
        "parallel.placement: set it to shards": job.parallel.placement != "shards",
        "parallel.transport: leave it out": job.parallel.transport != "object-store",
        "parallel.propagation: set it to pruned": job.parallel.effective_propagation != "pruned",
        "budget.allocation: take curves or search": (
            job.budget.per_layer and not isinstance(job.budget.allocation, CurvesAllocation)
        ),
        "export.pad: leave it out": job.export.pad,
        "correction.drift: set it to 0": job.correction.drift > 0,
        "method.scale: set it to weights": job.gradient_windows > 0,
        f"method {job.method.name}: take one that does not train": len(job.method.trainings) > 0,
        "recover: leave it out": job.recover is not None,
    }
    if asked := [what for what, is_asked in wrong.items() if is_asked]:
        raise SpecError(f"{asked[0]}: it is not done with mixtures of experts")
