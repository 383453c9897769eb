"""Training stages from the driver's side: DReSS and TRSP before the cut, recovery after it.

A stage is a task: a gang of ranks trains (`Executor.train`), the model that comes of it is a folder
in the Hugging Face format, and what follows works on that folder.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.run_folder import forget_report
from rayprune.orchestrator.execution.steps import Steps
from rayprune.orchestrator.planning.shapes import uneven_shape
from rayprune.orchestrator.stages import sweep
from rayprune.orchestrator.stages.context import Context, nothing_before
from rayprune.orchestrator.stages.reported import reported
from rayprune.orchestrator.stages.stream import layer_work, stream_layers
from rayprune.orchestrator.stages.subject import ModelAt, Subject, digests, file_digests, made_model
from rayprune.orchestrator.stages.teaching import ask_teacher
from rayprune.specs.methods.options import DriveOut, TakeOver
from rayprune.specs.training import TrainingSpec
from rayprune.workers.model.folder import INDEX_NAME, index_of, read_json
from rayprune.workers.model.sized_layers import MODULE
from rayprune.workers.store.files import Manifest, Task, commit, copy_file, link_file, write_json
from rayprune.workers.store.layout import (
    LAYER_FILE,
    OUTER_FILE,
    RECOVER_TASK,
    RECOVERY_TOKENS_TASK,
    REGULARISE_TASK,
    RESIDUAL_STREAM,
    RESULT_FILE,
    TEACHER_TASK,
    TOKENS_FILE,
    TRAINED_FOLDER,
    UPDATES_TASK,
    gates_task,
    recovered_task,
    regularised_task,
    selection_task,
    task_folder,
)
from rayprune.workers.store.side_files import COPIED, TOKENIZER_FILES, side_files
from rayprune.workers.store.training_stage import (
    Aim,
    Finetune,
    Gates,
    Goal,
    HeldOut,
    Penalty,
    Recovery,
    Removed,
    Shrink,
    Updates,
    forget_another,
    forget_states,
    settled,
)
from rayprune.workers.texts.limits import kept_out


def train_first(context: Context, subject: Subject) -> Subject:
    """What the method trains before it cuts: the trained model, and what was decided for it."""
    match context.job.method.before_cut:
        case DriveOut() as stage:
            subject, trained = _regularise(context, subject, stage)
        case TakeOver() as stage:
            subject, trained = _shrink_layers(context, subject, stage)
        case None:
            return subject
    folder = context.scope.folder(trained.task) / TRAINED_FOLDER
    context.executor.use_model(context.job, folder, context.scope.name)
    return replace(subject, model=made_model(folder, trained))


def _regularise(context: Context, subject: Subject, stage: DriveOut) -> tuple[Subject, Manifest]:
    """DReSS: choose what goes, then train with a penalty on it."""
    selections = (
        sweep.select_units(context, subject)
        if stage.seed is None
        else _random_mask(context, subject, stage.seed)
    )
    subject = replace(subject, selections=tuple(selections))
    units = subject.plan.model.units
    removed: list[Removed] = []
    for selection in selections:
        kept: Any = selection.info["result"]
        removed.append(
            {name: sorted(set(range(units[name])) - set(stay)) for name, stay in kept.items()}
        )
    if stage.each_layer:
        return subject, _regularise_layers(context, subject, removed)
    aim = Penalty(removed, stage.strength, stage.norm)
    return subject, _trained_first(context, subject, REGULARISE_TASK, stage.training, aim)


def _regularise_layers(context: Context, subject: Subject, removed: Sequence[Removed]) -> Manifest:
    """Train every layer alone, each where its activations arrive; then put the layers together."""
    work = [
        layer_work(
            context,
            subject,
            layer,
            regularised_task(layer),
            Steps.regularise,
            (gone,),
            [RESIDUAL_STREAM],
        )
        for layer, gone in enumerate(removed)
    ]
    layers = stream_layers(context, subject, REGULARISE_TASK, work)
    return _together(context, subject.model, REGULARISE_TASK, layers, own=False)


def _together(
    context: Context, model: ModelAt, name: str, layers: Sequence[Manifest], own: bool
) -> Manifest:
    """A model of layers that were trained alone; code is copied if this run has written it
    (`own`).
    """
    inputs = {
        "headers": model.checkpoint.identity,
        "outer": model.outer_digest,
        "beside the weights": file_digests(side_files(model.path, COPIED)),
        **digests(layers),
    }
    # the type is that of the layers' tasks; the name is also a training's
    task = context.task(name, inputs, computed_on=context.executor.device_kind)

    def put_together() -> None:
        forget_another(task.folder, task.fingerprint)
        trained = task.folder / TRAINED_FOLDER
        context.executor.wait([context.executor.on(0).copy_outer(str(trained / OUTER_FILE))])
        for layer in layers:
            link_file(
                context.scope.folder(layer.task) / LAYER_FILE, trained / f"{layer.task}.safetensors"
            )
        _complete(model.path, trained, own)
        commit(task, _files_in(trained), {"result": {}})

    return context.once(task, put_together)


def _random_mask(context: Context, subject: Subject, seed: int) -> list[Manifest]:
    """The units that stay, drawn for every layer and group."""
    chance, masks = random.Random(seed), []
    units, shape = subject.plan.model.units, subject.plan.shape
    for layer in range(subject.plan.model.num_layers):
        kept = {
            name: sorted(chance.sample(range(units[name]), shape.kept[name]))
            for name in subject.plan.pruned_groups(layer)
        }
        task = context.task(selection_task(layer), {"kept": kept})
        masks.append(context.once(task, partial(commit, task, [], {"result": kept})))
    return masks


def _shrink_layers(context: Context, subject: Subject, stage: TakeOver) -> tuple[Subject, Manifest]:
    """TRSP: one layer after the other is chosen by its gate, then all weights are trained with a
    penalty on their updates.
    """
    num_layers = subject.plan.model.num_layers
    gone = num_layers - len(subject.plan.shape.remaining(num_layers))
    open_to_choice = range(stage.protect_first, num_layers - stage.protect_last)
    gates, removed = [1.0] * num_layers, list[int]()
    for number in range(gone):
        aim = Gates(tuple(gates), tuple(removed), stage.gate_strength)
        chosen = _trained_first(context, subject, gates_task(number), stage.gates, aim)
        found: Any = chosen.info["result"]
        gates = found["gates"]
        removed.append(
            min(
                (layer for layer in open_to_choice if layer not in removed),
                key=lambda layer: abs(gates[layer]),
            )
        )
        context.emit(
            "layer-chosen", layer=removed[-1], gate=gates[removed[-1]], number=number + 1, of=gone
        )
    units = subject.plan.model.units
    dense, nothing = dict(units), dict.fromkeys(units, 0)
    spread = [nothing if layer in removed else dense for layer in range(num_layers)]
    shape = uneven_shape(context.job, subject.model.checkpoint, spread)
    subject = replace(subject, plan=context.record(subject.plan.chosen(shape)))
    transfer = (
        Updates(tuple(removed), stage.strength, stage.norm)
        if stage.transfer == "penalty"
        else Shrink(tuple(removed), stage.strength)
    )
    return subject, _trained_first(context, subject, UPDATES_TASK, stage.training, transfer)


def recover(context: Context, subject: Subject, pruned: ModelAt) -> ModelAt | None:
    """Train the pruned model, if the job says so, with the `subject` as its teacher; what comes of
    it lies in the task's folder.
    """
    spec, tokens = context.job.recover, subject.recovery_tokens
    if spec is None or tokens is None:
        return None
    if spec.scope == "layer":
        return _recover_layers(context, subject, pruned, tokens)
    depends: dict[str, object] = {"model": pruned.identity, "recovery-tokens": tokens.digest}
    teacher = taught = None
    if spec.teacher_top:
        depends["teacher"] = ask_teacher(context, subject.model, tokens).digest
        taught = str(task_folder(context.scope.run, TEACHER_TASK))
    elif spec.loss == "distillation":
        depends["teacher"] = subject.model.identity
        teacher = str(subject.model.path)
    # its type is one of the options that it reads
    task = context.task(RECOVER_TASK, depends, computed_on=context.executor.device_kind)
    held_out = None
    if looked_at := spec.held_out:
        held_out = HeldOut(kept_out(context.job), looked_at.every, looked_at.patience)
    stage = Finetune(
        str(pruned.path),
        str(task.folder),
        str(task_folder(context.scope.run, RECOVERY_TOKENS_TASK) / TOKENS_FILE),
        settled(spec, subject.model.checkpoint.parameters),
        Recovery(teacher, spec.hidden, spec.lora, taught),
        context.job.parallel.threads_per_worker,
        held_out,
    )
    return made_model(task.folder / TRAINED_FOLDER, _trained(context, task, stage))


def _recover_layers(
    context: Context, subject: Subject, pruned: ModelAt, tokens: Manifest
) -> ModelAt:
    """Train every layer of the pruned model alone, each where its hidden states arrive; then put
    the layers together.
    """
    dense, kept = subject.model, subject.plan.shape.remaining(subject.plan.model.num_layers)
    numbers = [layer if subject.numbers is None else subject.numbers[layer] for layer in kept]
    goal = Goal(
        str(dense.path),
        str(task_folder(context.scope.run, RECOVERY_TOKENS_TASK) / TOKENS_FILE),
        (0, *numbers[1:], dense.checkpoint.num_layers),
    )
    context.executor.use_model(context.job, pruned.path, context.scope.name)
    given = replace(subject, model=pruned, tokens=tokens, goal=goal)
    teacher = {"teacher": dense.identity, "bounds": list(goal.bounds)}
    arguments = dense.checkpoint.parameters, kept_out(context.job)
    work = [
        layer_work(
            context,
            given,
            layer,
            recovered_task(layer),
            Steps.recover,
            arguments,
            [RESIDUAL_STREAM],
            **teacher,
        )
        for layer in range(len(numbers))
    ]
    layers = stream_layers(context, given, RECOVER_TASK, work)
    done = _together(context, pruned, RECOVER_TASK, layers, own=True)
    return made_model(context.scope.folder(RECOVER_TASK) / TRAINED_FOLDER, done)


def _trained_first(
    context: Context, subject: Subject, name: str, options: TrainingSpec, aim: Aim
) -> Manifest:
    """Train the subject's model before it is cut, once."""
    model, job = subject.model.path, context.job
    inputs = {"model": subject.model.identity, "texts": subject.texts, "aim": asdict(aim)}
    inputs["tokenizer"] = file_digests(side_files(model, TOKENIZER_FILES))
    task = context.task(name, inputs, computed_on=context.executor.device_kind)
    threads = job.parallel.threads_per_worker
    before = job.method.before_cut
    stage = Finetune(
        str(model),
        str(task.folder),
        job.calibration,
        options,
        aim,
        threads,
        from_itself=before is not None and before.loss == "distillation",
    )

    def check_text() -> None:
        if job.windows_read > job.calibration.samples:
            # before what another training has left is removed
            context.executor.wait([context.executor.on(0).check_text()])

    return _trained(context, task, stage, check_text)


def _trained(
    context: Context, task: Task, stage: Finetune, check_text: Callable[[], None] = nothing_before
) -> Manifest:
    """Train, once."""
    name = task.name

    def work() -> None:
        check_text()
        forget_report(context.folder.path)
        forget_another(task.folder, task.fingerprint)
        with context.stage(name, 1):
            with reported(context, name, task.folder):
                context.executor.train(stage)
            _commit(context, task, stage)
        forget_states(task.folder)

    return context.once(task, work, before_redoing=check_text)


def _commit(context: Context, task: Task, stage: Finetune) -> None:
    files = [RESULT_FILE]
    if not isinstance(stage.aim, Gates):
        trained, own = task.folder / TRAINED_FOLDER, isinstance(stage.aim, Recovery)
        _complete(Path(stage.model), trained, own)
        files += _files_in(task.folder / TRAINED_FOLDER)
    facts: dict[str, Any] = read_json(task.folder / RESULT_FILE)
    result = {"gates": facts.pop("gates", None)}
    for text in facts.pop("warnings"):
        context.emit("warning", text=text)
    context.emit("trained", task=task.name, **facts)
    computed_on = f"{task.made_from['computed_on']} in {stage.options.dtype}"
    commit(task, files, {"result": result, "facts": facts, "computed_on": computed_on})


def _files_in(trained: Path) -> list[str]:
    return [
        f"{TRAINED_FOLDER}/{file.relative_to(trained)}"
        for file in trained.rglob("*")
        if file.is_file()
    ]


def _complete(source: Path, trained: Path, own: bool) -> None:
    """Config, tokenizer and index beside the trained weights; all is the source's, code only if
    this run has written it (`own`).
    """
    code = [file for file in (source / f"{MODULE}.py",) if own and file.exists()]
    for file in (source / "config.json", *side_files(source, COPIED), *code):
        copy_file(file, trained / file.relative_to(source))
    names = sorted(file.name for file in trained.glob("*.safetensors"))
    write_json(trained / INDEX_NAME, index_of(trained, names))
