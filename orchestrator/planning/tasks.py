"""The tasks of a plan, in the order of a run."""

from rayprune.orchestrator.planning.own_text import own_tasks
from rayprune.orchestrator.planning.shapes import Shape
from rayprune.specs.allocation import CurvesAllocation, SearchAllocation
from rayprune.specs.job import JobSpec
from rayprune.specs.methods.options import DriveOut, TakeOver
from rayprune.workers.model.description import Model
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    EXPORT_TASK,
    GRADIENTS_TASK,
    OUTER_TASK,
    RECOVER_TASK,
    RECOVERY_TOKENS_TASK,
    REGULARISE_TASK,
    SENSITIVITY_TASK,
    SHAPE_TASK,
    SOURCE_TASK,
    TEACHER_TASK,
    UPDATES_TASK,
    converted_task,
    gates_task,
    generation_task,
    layer_task,
    recovered_task,
    regularised_task,
    selection_task,
    survey_task,
)


def task_names(job: JobSpec, model: Model, shape: Shape, num_shapes: int) -> tuple[str, ...]:
    """All tasks of a plan."""
    num_layers = model.num_layers
    names = (
        (selection_task, layer_task)
        if job.parallel.effective_propagation == "refit"
        else (layer_task,)
    )
    layers = tuple(name(layer) for name in names for layer in range(num_layers))
    allocation = job.budget.allocation
    spread: tuple[str, ...] = _trained_first(job, shape, num_layers)
    if job.budget.per_layer:
        spread = (*(survey_task(layer) for layer in range(num_layers)), SHAPE_TASK)
    if isinstance(allocation, CurvesAllocation):
        spread = (SENSITIVITY_TASK, *spread)
    if isinstance(allocation, SearchAllocation):
        spread = (*map(generation_task, range(allocation.generations)), *spread)
    # of an encoder that predicts nothing, embeddings are compared alone
    before = ("evaluate-before",) if model.causal or model.predicts_masked else ()
    evaluation = (EVALUATION_TASK, *before, "evaluate-after") if job.evaluation else ()
    recovery: tuple[str, ...] = ()
    if job.recover:
        evaluated = ("evaluate-recovered",) if job.evaluation else ()
        alone = job.recover.scope == "layer"
        each = map(recovered_task, range(len(shape.remaining(num_layers)))) if alone else ()
        recovery = (*teacher_tasks(job), *each, RECOVER_TASK, *evaluated)
    gradients = (GRADIENTS_TASK,) if job.gradient_windows else ()
    formats = map(converted_task, job.converted)
    return (
        *own_tasks(job),
        CALIBRATION_TASK,
        *recovery_text(job),
        SOURCE_TASK,
        *gradients,
        *spread,
        *((SHAPE_TASK,) if num_shapes > 1 else ()),
        *layers,
        OUTER_TASK,
        EXPORT_TASK,
        *evaluation,
        *recovery,
        *formats,
    )


def _trained_first(job: JobSpec, shape: Shape, num_layers: int) -> tuple[str, ...]:
    """Trainings before the cut."""
    match job.method.before_cut:
        case DriveOut(each_layer=each_layer):
            alone = map(regularised_task, range(num_layers)) if each_layer else ()
            return (*map(selection_task, range(num_layers)), *alone, REGULARISE_TASK)
        case TakeOver():
            return (
                *map(gates_task, range(num_layers - len(shape.remaining(num_layers)))),
                UPDATES_TASK,
            )
    return ()


def recovery_text(job: JobSpec) -> tuple[str, ...]:
    """The task that tokenises what a recovery is trained on, if there is one."""
    return (RECOVERY_TOKENS_TASK,) if job.recover else ()


def teacher_tasks(job: JobSpec) -> tuple[str, ...]:
    """The task that asks the dense model before a recovery, if there is one."""
    return (TEACHER_TASK,) if job.recover and job.recover.teacher_top else ()
