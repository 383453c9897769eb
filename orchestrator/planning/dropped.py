"""Whole layers that go without training, before anything else is cut: which may, what they leave to
be cut, and what all of it takes.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from rayprune.orchestrator.planning.disk import DiskNeed
from rayprune.orchestrator.planning.footprint import exceeded, footprint, limits
from rayprune.orchestrator.planning.plan import Dropped, Plan, make_plan
from rayprune.orchestrator.planning.rounding import told_of_sizes
from rayprune.orchestrator.planning.shapes import Shape, uneven_shape
from rayprune.orchestrator.planning.speeds import predicted_speeds
from rayprune.orchestrator.planning.together import (
    needs_together,
    of_stages,
    relative_sparsity,
    seconds_together,
    stages_together,
    traffic_together,
)
from rayprune.orchestrator.planning.worker_memory import total
from rayprune.specs.budget import BudgetSpec
from rayprune.specs.errors import SpecError
from rayprune.specs.export import ExportSpec
from rayprune.specs.job import CorrectionSpec, JobSpec
from rayprune.specs.machine import MachineProfile
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.layout import (
    EXPORT_TASK,
    RECOVER_TASK,
    SOURCE_TASK,
    TEACHER_TASK,
    WHOLE_LAYERS,
    dropped_task,
)

_OWN_TEXT = "own text"
_STAGES = (_OWN_TEXT, "divergence", "write", TEACHER_TASK, RECOVER_TASK, "evaluate")
_TRAINING = ("teach", "train", "train layer")
_EVALUATION = ("evaluate", "whole model")
_STEPS = (_OWN_TEXT, "divergence", "write", "write outer", *_EVALUATION, *_TRAINING, "convert")
"""What is done where nothing but layers goes."""


def droppable(job: JobSpec, checkpoint: Checkpoint) -> list[int]:
    """The layers that may go.

    Raises:
        SpecError: the job names others, or more than may go.
    """
    asked, count = job.budget.drop_layers, checkpoint.num_layers
    if reason := checkpoint.model.not_pruned:
        raise SpecError(
            f"budget.drop_layers: a model that is only planned ({reason}) keeps its layers; leave"
            " it out"
        )
    reasons = checkpoint.model.stay
    may_go = [layer for layer in range(count) if layer not in reasons]
    gone = asked if isinstance(asked, int) else len(asked or ())
    if gone >= count or gone > len(may_go):
        most = min(count - 1, len(may_go))
        why = "".join(f"; layer {layer} stays: {reason}" for layer, reason in reasons.items())
        raise SpecError(f"budget.drop_layers: {gone} of {count} layers; at most {most} can go{why}")
    if isinstance(asked, list) and (wrong := [layer for layer in asked if layer not in may_go]):
        if reason := reasons.get(wrong[0]):
            raise SpecError(
                f"budget.drop_layers: layer {wrong[0]} has to stay: {reason}; take another one"
            )
        raise SpecError(
            f"budget.drop_layers: there is no layer {wrong[0]}; the model has {count}, counted from"
            " 0"
        )
    return may_go


def left_by(job: JobSpec, checkpoint: Checkpoint, gone: Collection[int]) -> Shape:
    """The shape of the model without these layers and nothing else gone."""
    dense = checkpoint.model.units
    nothing = dict.fromkeys(dense, 0)
    numbers = range(checkpoint.num_layers)
    return uneven_shape(job, checkpoint, [nothing if n in gone else dense for n in numbers])


def rest_of(job: JobSpec, checkpoint: Checkpoint, left: Shape) -> JobSpec | None:
    """The job that prunes what is left when the layers are gone, so that all of it meets the
    budget; None: it is met already.

    Raises:
        SpecError: it is met already, and the job asks for more that would not be done.
    """
    budget, original = job.budget, checkpoint.decoder_parameters
    size = footprint(checkpoint, left.layers, job)
    if not exceeded(size, limits(budget, original)):
        more = {
            "budget.kv_groups": budget.kv_groups != "auto",
            "budget.experts": budget.experts is not None,
            "budget.per_layer": budget.per_layer,
            f"method: {job.method.name}": bool(job.method.trainings),
            "correction.drift": job.correction.drift > 0,
        }
        if asked := [name for name, given in more.items() if given]:
            raise SpecError(
                f"budget.drop_layers: without these layers the model meets its targets, and nothing"
                f" is left to do for {asked[0]}; leave it out, drop fewer layers, or ask for more"
            )
        return None
    relative = budget.sparsity and relative_sparsity(
        budget.sparsity, original, left.decoder_parameters
    )
    changes = {
        "drop_layers": None,
        "drop_score": "influence",
        "drop_samples": 8,
        "sparsity": relative if relative and relative > 0 else None,
    }
    return job.model_copy(update={"budget": budget.model_copy(update=changes)})


def layers_job(job: JobSpec, last: bool) -> JobSpec:
    """The job of leaving out layers alone; unless it is the last that is done, in the original's
    form.
    """
    names = ("drop_layers", "drop_score", "drop_samples")
    kept = {name: getattr(job.budget, name) for name in names}
    one_way = {"placement": "shards", "propagation": "auto"}
    changes: dict[str, object] = {
        "parallel": job.parallel.model_copy(update=one_way),
        "method": StatOptions(),
        "correction": CorrectionSpec(),
        "budget": BudgetSpec(**kept),
        "export": job.export.model_copy(update={"pad": False}),
    }
    if not last:
        changes |= {"export": ExportSpec(), "recover": None, "evaluation": None}
    return job.model_copy(update=changes)


def whole(shape: Shape, there: Sequence[int], num_layers: int) -> Shape:
    """A shape of the model that keeps the layers `there`, as one of all its layers."""
    units = [dict.fromkeys(shape.kept, 0) for _ in range(num_layers)]
    for number, layer in enumerate(there):
        units[layer] = shape.kept_in(number)
    return replace(shape, layers=tuple(units))


def plan_dropping(
    job: JobSpec, checkpoint: Checkpoint, machine: MachineProfile | None, device: str | None
) -> Plan:
    """Plan layers that go, and what is pruned after them. Where the run chooses the layers, the
    last ones stand for them.

    Raises:
        RaypruneError: as `make_plan` says.
    """
    asked, may_go = job.budget.drop_layers, droppable(job, checkpoint)
    gone = asked if isinstance(asked, list) else may_go[-(asked or 0) :]
    left = left_by(job, checkpoint, gone)
    rest = rest_of(job, checkpoint, left)
    chosen_by = job.budget.drop_score if isinstance(asked, int) else None
    held = checkpoint.decoder_parameters - left.decoder_parameters
    layers = () if chosen_by else tuple(sorted(gone))
    dropped = Dropped(len(gone), layers, chosen_by, held)
    alone = layers_job(job, rest is None)
    first = _layers_plan(make_plan(alone, checkpoint, machine, device, given=(left,)))
    tasks = _choices(job)
    if rest is None:
        return replace(first, tasks=_inserted(first.tasks, tasks), dropped=dropped)
    there = left.remaining(checkpoint.num_layers)
    shorter = checkpoint.planned_layers(there)
    second = _written_already(make_plan(rest, shorter, machine, device, original=checkpoint))
    plans = [first, second]
    spills = any(plan.memory.spill_hidden for plan in plans)
    shapes = tuple(whole(shape, there, checkpoint.num_layers) for shape in second.shapes)
    return replace(
        second,
        model=first.model,
        shapes=shapes,
        speeds=tuple(
            replace(speed, dense=whole.dense)
            for whole, speed in zip(
                predicted_speeds(job, checkpoint, ()), second.speeds, strict=True
            )
        ),
        sizes=told_of_sizes(job, checkpoint, shapes[0].decoder_parameters),
        tasks=_inserted(second.tasks, tasks),
        memory=replace(second.memory, spill_hidden=spills),
        needs=needs_together([plan.needs for plan in plans]),
        stages=tuple(stages_together(plans)),
        seconds=seconds_together([plan.seconds for plan in plans]),
        seconds_with_layers=None,
        traffic=traffic_together(plans),
        disk=(DiskNeed(f"{WHOLE_LAYERS}/{EXPORT_TASK}", first.output_bytes), *second.disk),
        dropped=dropped,
    )


def _choices(job: JobSpec) -> tuple[str, ...]:
    """The measurements by which layers are chosen."""
    asked = job.budget.drop_layers
    if not isinstance(asked, int):
        return ()
    rounds = 1 if job.budget.drop_score == "influence" else asked
    return tuple(map(dropped_task, range(rounds)))


def _inserted(tasks: tuple[str, ...], choices: tuple[str, ...]) -> tuple[str, ...]:
    place = tasks.index(SOURCE_TASK) + 1
    return (*tasks[:place], *choices, *tasks[place:])


def _layers_plan(plan: Plan) -> Plan:
    """A plan by which no layer is looked into, only measured and written."""
    held = {name: dict(plan.needs.memory_by_step.get(name, {})) for name in _STEPS}
    for kind in ("hidden states", "inputs"):  # a layer that is only written meets none
        held["write"].pop(kind, None)
    return _of_parts(plan, _STAGES, {name: needed for name, needed in held.items() if needed})


def _written_already(plan: Plan) -> Plan:
    """A plan without the text of its own, which the original has written."""
    stages = [stage.name for stage in plan.stages if stage.name != _OWN_TEXT]
    held = {name: kinds for name, kinds in plan.needs.memory_by_step.items() if name != _OWN_TEXT}
    return _of_parts(plan, stages, held)


def _of_parts(plan: Plan, names: Collection[str], held: dict[str, dict[str, int]]) -> Plan:
    """A plan of these stages alone, and of steps that hold so much."""
    most = max(map(total, held.values()), default=plan.needs.worker_memory_bytes)
    needs = replace(plan.needs, memory_by_step=held, worker_memory_bytes=most)
    return replace(of_stages(plan, names), seconds_with_layers=None, needs=needs)
