"""The workload of a job: what the cost formulas need to know of it and of its model."""

from dataclasses import replace

from rayprune.orchestrator.planning.layer_kinds import LayerKind
from rayprune.orchestrator.planning.mixtures import kept_experts
from rayprune.orchestrator.planning.own_text import own_text_load
from rayprune.orchestrator.planning.rounding import asked_units, unit_steps
from rayprune.orchestrator.planning.shapes import Shape
from rayprune.orchestrator.planning.workload import TrainingLoad, Workload
from rayprune.specs.allocation import CurvesAllocation, SearchAllocation, ThresholdAllocation
from rayprune.specs.job import JobSpec
from rayprune.specs.methods.options import DriveOut, TakeOver
from rayprune.specs.own_text import OWN_TEXT
from rayprune.specs.section import FloatType
from rayprune.specs.texts import WindowsSpec
from rayprune.specs.training import RecoverSpec, TrainingSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.config import DTYPES
from rayprune.workers.model.description import Model
from rayprune.workers.model.folder import PLANNED_BYTES
from rayprune.workers.model.sites import sites_of
from rayprune.workers.store.layout import RECOVER_TASK, REGULARISE_TASK, UPDATES_TASK
from rayprune.workers.store.training_stage import saved_states, total_steps
from rayprune.workers.texts.limits import kept_out, with_own


def workload_of(
    job: JobSpec,
    checkpoint: Checkpoint,
    kinds: tuple[LayerKind, ...],
    shapes: tuple[Shape, ...],
    on_gpu: bool,
) -> Workload:
    """What the cost formulas need. Of several open shapes, each group counts with most units; it is
    pruned if any shape prunes it.
    """
    model, calibration, evaluation = checkpoint.model, job.calibration, job.evaluation
    outer = sum(info.num_parameters for info in checkpoint.outer_tensors.values())
    if masks := job.method.masks:
        found = sites_of(model)
        sites = tuple(found[name].input for name in masks.sites)
        kinds = tuple(replace(kind, sites=sites) for kind in kinds)
    return Workload(
        kinds=kinds,
        kept=_least_cut(model, job) if job.budget.per_layer else _most_kept(model, shapes),
        hidden=model.hidden,
        vocabulary=model.vocabulary if model.head else 0,
        outer_parameters=outer,
        bytes_on_disk=checkpoint.bytes_on_disk,
        output_bytes=max(shape.parameters for shape in shapes)
        * _written_element_bytes(job, checkpoint),
        samples=calibration.samples,
        sequence_length=calibration.sequence_length,
        shards=calibration.shards,
        held_out_shards=calibration.held_out_shards,
        micro_batch=job.parallel.micro_batch,
        workers=1 if job.cluster.executor == "in-process" else job.parallel.workers,
        on_gpu=on_gpu,
        element_bytes=_element_bytes(job.model.dtype, checkpoint, on_gpu),
        written_element_bytes=_written_element_bytes(job, checkpoint),
        num_candidates=(
            len(job.correction.candidates) if job.correction.damping == "held-out" else 1
        ),
        checkpoint_layers=job.memory.checkpoint_layers,
        evaluation_tokens=(
            len(evaluation.by_name)
            * (evaluation.max_windows or calibration.samples)
            * evaluation.window
            if evaluation
            else 0
        ),
        evaluation_window=evaluation.window if evaluation else 1,
        most_evaluated=(
            evaluation.max_windows * len(evaluation.by_name)
            if evaluation and evaluation.max_windows
            else None
        ),
        ranking=job.method.selector,
        selects=not job.method.selects_first,
        exact=job.method.needs_rows,
        masks=masks,
        causal=model.causal,
        token_inputs=model.token_inputs,
        for_later=sum(model.for_later.values()),
        # each other model beside the dense one; of an encoder, losses and embeddings of both
        evaluations=(
            2 + 2 * (job.recover is not None) if model.causal else 4 if model.predicts_masked else 2
        ),
        drift=job.correction.drift > 0,
        probes=job.budget.kv_groups == "auto" and not job.budget.per_layer and masks is None,
        in_process=job.cluster.executor == "in-process",
        survey_levels=_survey_levels(job),
        candidates=_candidates(job, model) + _without_layers(job, model.num_layers),
        trainings=_trainings(job, shapes[0], model.num_layers),
        gradient_windows=job.gradient_windows,
        candidate_windows=job.divergence_windows or job.drop_windows,
        own_text=own_text_load(job, checkpoint, _element_bytes(job.own_dtype, checkpoint, on_gpu)),
        experts=kept_experts(job, checkpoint) or None,
        converts=any(target.startswith("gguf") for target in job.converted),
        exchanges=job.parallel.transport == "collective",
        placement=job.parallel.placement,
        propagation=job.parallel.effective_propagation,
    )


def _trainings(job: JobSpec, shape: Shape, num_layers: int) -> tuple[TrainingLoad, ...]:
    """The trainings of a job; those of gates, one for each layer that goes, count with the one of
    all weights, which takes more memory.
    """
    loads, windows = [], job.calibration.samples
    if first := job.method.before_cut:
        load = _training(first.training, first.training.samples or windows, job.calibration)
        if isinstance(first, TakeOver):
            gates = _training(first.gates, first.gates.samples or windows, job.calibration)
            gone = num_layers - len(shape.remaining(num_layers))
            load = replace(
                load, trained_windows=load.trained_windows + gone * gates.trained_windows
            )
        loads.append(
            replace(
                load,
                teacher=first.loss == "distillation",
                each_layer=job.method.trains_layers_alone,
                streamed_windows=windows if job.method.trains_layers_alone else 0,
                task=REGULARISE_TASK if isinstance(first, DriveOut) else UPDATES_TASK,
            )
        )
    if job.recover:
        loads.append(_recovery(job, job.recover))
    return tuple(loads)


def _recovery(job: JobSpec, recover: RecoverSpec) -> TrainingLoad:
    text, held_out = with_own(job, OWN_TEXT).recovery_text, recover.held_out
    top = recover.teacher_top or 0
    looked_at = len(kept_out(job))
    load = _training(recover, text.samples - looked_at, text)
    return replace(
        load,
        teacher=recover.loss == "distillation" and not top,
        each_layer=recover.scope == "layer",
        streamed_windows=text.samples if recover.scope == "layer" else 0,
        lora_rank=recover.lora.rank if recover.lora else 0,
        task=RECOVER_TASK,
        measured_windows=looked_at * (2 + load.steps // held_out.every) if held_out else 0,
        keeps_best=held_out is not None,
        taught_windows=text.samples if top else 0,
        teacher_top=top,
    )


def _training(options: TrainingSpec, num_windows: int, text: WindowsSpec) -> TrainingLoad:
    steps = total_steps(options, num_windows)
    return TrainingLoad(
        options.micro_batch,
        None
        if options.activation_checkpointing == "auto"
        else not options.activation_checkpointing,
        4 if options.dtype == "float32" else 2,
        saved_states=saved_states(options, num_windows),
        sequence_length=text.sequence_length,
        steps=steps,
        trained_windows=steps * options.batch,
    )


def _survey_levels(job: JobSpec) -> int:
    """Corrections of a group in the survey: an error for every level, and the weights that are kept
    of it.

    A mask, and layers that are trained alone, need none, but a pass like it.
    """
    first = job.method.before_cut
    if isinstance(first, DriveOut) and (first.each_layer or first.seed is None):
        return 1
    match job.budget.allocation:
        case SearchAllocation(levels=levels):
            return 2 * levels
        case CurvesAllocation(levels=levels):
            return levels + 1
        case ThresholdAllocation():
            return 1
    return 0


def _candidates(job: JobSpec, model: Model) -> int:
    """Every group of every layer alone, and what the search tries."""
    alone = sum(not group.times for layer in model.layers for group in layer.groups)
    match job.budget.allocation:
        case SearchAllocation(generations=generations, offspring=offspring):
            return alone + generations * (offspring + 1)
        case CurvesAllocation():
            return alone
    return 0


def _without_layers(job: JobSpec, num_layers: int) -> int:
    """Models without a layer more that are measured until all layers to be dropped are chosen; for
    their influence one pass is enough.
    """
    asked = job.budget.drop_layers
    if not isinstance(asked, int):
        return 0
    if job.budget.drop_score == "influence":
        return 1
    return sum(num_layers - gone for gone in range(asked))


def _least_cut(model: Model, job: JobSpec) -> dict[str, int]:
    """Where layers may differ: what a layer keeps that loses as little as can be."""
    steps = unit_steps(job, model)
    most = {
        group.name: (group.num_units - 1) // steps[group.name] * steps[group.name]
        for group in model.groups
    }
    most |= asked_units(job, model)
    return {name: count for name, count in most.items() if 0 < count < model.units[name]}


def _most_kept(model: Model, shapes: tuple[Shape, ...]) -> dict[str, int]:
    units = model.units
    fewer = {
        name: [shape.kept[name] for shape in shapes if shape.kept[name] < units[name]]
        for name in units
    }
    return {name: max(kept) for name, kept in fewer.items() if kept}


def _element_bytes(dtype: FloatType, checkpoint: Checkpoint, on_gpu: bool) -> int:
    """Bytes per element of forward passes in a type."""
    if dtype == "auto":
        return PLANNED_BYTES[DTYPES[checkpoint.model.dtype]] if on_gpu else 4
    return 4 if dtype == "float32" else 2


def _written_element_bytes(job: JobSpec, checkpoint: Checkpoint) -> int:
    """Bytes per element of the pruned model on disk, the widest where they differ."""
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) > 1]
    widest = max(PLANNED_BYTES[info.dtype] for info in matrices)
    return {"auto": widest, "float32": 4}.get(job.export.dtype, 2)
