"""Training stages from the driver's side: DReSS and TRSP before the cut, recovery after it.

A stage is a task: a gang of ranks trains (`Executor.train`), the model that comes of it is a folder
in the Hugging Face format, and what follows works on that folder.
"""

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.run_folder import forget_report
from rayprune.orchestrator.execution.steps import Steps
from rayprune.orchestrator.planning.shapes import uneven_shape
from rayprune.orchestrator.stages import sweep
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.export import write_index
from rayprune.orchestrator.stages.stream import layer_tasks, stream_layers
from rayprune.specs.methods.options import DriveOut, TakeOver
from rayprune.specs.training import HOW_TRAINED, TrainingSpec
from rayprune.workers.model.checkpoint import open_checkpoint, read_json
from rayprune.workers.model.sized_layers import MODULE
from rayprune.workers.store.files import Manifest, commit, copy_file, fingerprint, link_file
from rayprune.workers.store.layout import (
    LAYER_FILE,
    OUTER_FILE,
    RECOVER_TASK,
    REGULARISE_TASK,
    RESIDUAL_STREAM,
    RESULT_FILE,
    TRAINED_FOLDER,
    UPDATES_TASK,
    gates_task,
    model_folder,
    regularised_task,
    selection_task,
    task_folder,
)
from rayprune.workers.store.side_files import COPIED, side_files
from rayprune.workers.store.training_stage import (
    Aim,
    Finetune,
    Gates,
    Penalty,
    Recovery,
    Removed,
    Shrink,
    Updates,
    forget_another,
    forget_states,
    read_log,
)

REPORT_SECONDS = 5.0


def train_first(context: Context, tokens: Manifest) -> None:
    """What the method trains before it cuts; afterwards the context's checkpoint is the trained
    model.
    """
    match context.job.method.before_cut:
        case DriveOut() as stage:
            trained = _regularise(context, stage, tokens)
        case TakeOver() as stage:
            trained = _shrink_layers(context, stage, tokens)
        case None:
            return
    folder = task_folder(context.folder.path, trained.task) / TRAINED_FOLDER
    context.source, found = context.checkpoint, open_checkpoint(folder)
    context.checkpoint = replace(
        found, identity=fingerprint({"model": found.identity, "trained": trained.digest})
    )
    context.executor.use_model(folder)


def _regularise(context: Context, stage: DriveOut, tokens: Manifest) -> Manifest:
    """DReSS: choose what goes, then train with a penalty on it."""
    context.selections = (
        sweep.select_units(context, tokens)
        if stage.seed is None
        else _random_mask(context, stage.seed)
    )
    units = context.plan.model.units
    removed: list[Removed] = []
    for selection in context.selections:
        kept: Any = selection.info["result"]
        removed.append(
            {name: sorted(set(range(units[name])) - set(stay)) for name, stay in kept.items()}
        )
    inputs = [*context.inputs(tokens), *(selection.digest for selection in context.selections)]
    if stage.each_layer:
        return _regularise_layers(context, removed, inputs)
    aim = Penalty(removed, stage.strength, stage.norm)
    return _trained(context, REGULARISE_TASK, context.checkpoint.path, stage.training, aim, inputs)


def _regularise_layers(
    context: Context, removed: Sequence[Removed], inputs: Sequence[str]
) -> Manifest:
    """Train every layer alone, each where its activations arrive; then put the layers together."""
    count = len(removed)
    watched = [[RESIDUAL_STREAM]] * count
    tasks = layer_tasks(
        context,
        Steps.regularise,
        regularised_task,
        [inputs] * count,
        [(gone,) for gone in removed],
        watched,
    )
    layers = stream_layers(context, REGULARISE_TASK, tasks)
    expected = context.folder.fingerprint(REGULARISE_TASK, *(layer.digest for layer in layers))
    folder = task_folder(context.folder.path, REGULARISE_TASK)

    def work() -> None:
        trained = folder / TRAINED_FOLDER
        context.executor.wait([context.executor.on(0).copy_outer(str(trained / OUTER_FILE))])
        for layer in layers:
            link_file(
                task_folder(context.folder.path, layer.task) / LAYER_FILE,
                trained / f"{layer.task}.safetensors",
            )
        _complete(context.checkpoint.path, trained, own=False)
        commit(folder, REGULARISE_TASK, expected, _files_in(trained), {"result": {}})

    return context.once(REGULARISE_TASK, expected, work)


def _random_mask(context: Context, seed: int) -> list[Manifest]:
    """The units that stay, drawn for every layer and group."""
    chance, masks = random.Random(seed), []
    units, shape = context.plan.model.units, context.plan.shape
    for layer in range(context.plan.model.num_layers):
        kept = {
            name: sorted(chance.sample(range(units[name]), shape.kept[name]))
            for name in context.plan.pruned_groups(layer)
        }
        task = selection_task(layer)
        expected = context.folder.fingerprint(task, context.checkpoint.identity, str(kept))
        folder = task_folder(context.folder.path, task)
        masks.append(
            context.once(
                task, expected, partial(commit, folder, task, expected, [], {"result": kept})
            )
        )
    return masks


def _shrink_layers(context: Context, stage: TakeOver, tokens: Manifest) -> Manifest:
    """TRSP: one layer after the other is chosen by its gate, then all weights are trained with a
    penalty on their updates.
    """
    num_layers = context.plan.model.num_layers
    gone = num_layers - len(context.plan.shape.remaining(num_layers))
    open_to_choice = range(stage.protect_first, num_layers - stage.protect_last)
    gates, removed, inputs = [1.0] * num_layers, list[int](), context.inputs(tokens)
    for number in range(gone):
        aim = Gates(tuple(gates), tuple(removed), stage.gate_strength)
        chosen = _trained(
            context, gates_task(number), context.checkpoint.path, stage.gates, aim, inputs
        )
        found: Any = chosen.info["result"]
        gates = found["gates"]
        removed.append(
            min(
                (layer for layer in open_to_choice if layer not in removed),
                key=lambda layer: abs(gates[layer]),
            )
        )
        inputs = [*context.inputs(tokens), chosen.digest]
        context.emit(
            "layer-chosen", layer=removed[-1], gate=gates[removed[-1]], number=number + 1, of=gone
        )
    dense, nothing = dict(context.plan.model.units), dict.fromkeys(context.plan.model.units, 0)
    spread = [nothing if layer in removed else dense for layer in range(num_layers)]
    context.settle(context.plan.chosen(uneven_shape(context.job, context.checkpoint, spread)))
    transfer = (
        Updates(tuple(removed), stage.strength, stage.norm)
        if stage.transfer == "penalty"
        else Shrink(tuple(removed), stage.strength)
    )
    return _trained(
        context, UPDATES_TASK, context.checkpoint.path, stage.training, transfer, inputs
    )


def recover(context: Context, exported: Manifest) -> Manifest | None:
    """Train the pruned model, if the job says so; what comes of it lies in the task's folder."""
    spec = context.job.recover
    if spec is None:
        return None
    teacher = str(context.original.path) if spec.loss == "distillation" else None
    inputs = [exported.digest, context.original.identity]
    return _trained(
        context,
        RECOVER_TASK,
        model_folder(context.folder.path),
        spec,
        Recovery(teacher, spec.hidden, spec.lora),
        inputs,
    )


def _trained(
    context: Context, task: str, model: Path, options: TrainingSpec, aim: Aim, inputs: list[str]
) -> Manifest:
    what = context.job.result_part() | {
        "training": options.model_dump(mode="json", exclude=HOW_TRAINED)
    }
    expected = context.folder.fingerprint(task, *inputs, part=what)
    folder = task_folder(context.folder.path, task)
    threads = context.job.parallel.threads_per_worker
    stage = Finetune(str(model), str(folder), context.job.calibration, options, aim, threads)

    def work() -> None:
        if context.job.windows_read > context.job.calibration.samples:
            # before what another training has left is removed
            context.executor.wait([context.executor.on(0).check_text()])
        forget_report(context.folder.path)
        forget_another(folder, expected)
        with context.stage(task, 1):
            with _reported(context, task, folder):
                context.executor.train(stage)
            files = [RESULT_FILE]
            if not isinstance(aim, Gates):
                _complete(model, folder / TRAINED_FOLDER, own=isinstance(aim, Recovery))
                files += _files_in(folder / TRAINED_FOLDER)
            facts: dict[str, Any] = read_json(folder / RESULT_FILE)
            result = {"gates": facts.pop("gates", None)}
            facts["peak_memory_bytes"] = {
                f"rank-0{kind}": peak for kind, peak in facts["peak_memory_bytes"].items()
            }
            context.emit("trained", task=task, **facts)
            commit(folder, task, expected, files, {"result": result, "facts": facts})
        forget_states(folder)

    return context.once(task, expected, work, redo_stale=isinstance(aim, Recovery))


@contextmanager
def _reported(context: Context, task: str, folder: Path) -> Iterator[None]:
    """Report the newest step that was logged, every few seconds and at the end: meanwhile the
    driver waits for the ranks.
    """
    ended, shown = threading.Event(), [-1]

    def report() -> None:
        if (log := read_log(folder)) and log[-1]["step"] != shown[0]:
            shown[0] = log[-1]["step"]
            context.emit("training-step", task=task, **log[-1])

    def watch() -> None:
        while not ended.wait(REPORT_SECONDS):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    report()


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
    write_index(trained, sorted(file.name for file in trained.glob("*.safetensors")))
