"""The reducer: index, config, tokenizer and the exported folder's manifest. Weights are only given
their final names.

The folder loads with plain `AutoModelForCausalLM.from_pretrained`; the load gate proves it before
the task is finished.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rayprune.orchestrator.planning.footprint import footprint
from rayprune.orchestrator.stages.context import Context
from rayprune.workers.model.checkpoint import INDEX_NAME, read_header
from rayprune.workers.model.rewrite import Written
from rayprune.workers.store.files import (
    Manifest,
    commit,
    copy_file,
    link_file,
    write_json,
    write_text,
)
from rayprune.workers.store.layout import (
    EXPORT_TASK,
    LAYER_FILE,
    OUTER_FILE,
    OUTER_TASK,
    layer_task,
    model_folder,
    task_folder,
)
from rayprune.workers.store.side_files import COPIED, side_files


def export_model(context: Context, layers: Sequence[Manifest]) -> Manifest:
    """Assemble `model/` from the finished layers and check that it loads; the manifest of the task.

    Raises:
        VerificationError: the folder does not load as planned.
    """
    folder, executor = context.folder, context.executor
    with context.stage("export", 1):
        layers_written = context.plan.written_layers(context.job.export.pad)
        alike = all(kept == layers_written[0] for kept in layers_written)
        written = layers_written[0] if alike else None
        outer = folder.fingerprint(OUTER_TASK, context.checkpoint.identity, str(written))
        outer_done = context.once(
            OUTER_TASK, outer, lambda: executor.wait([executor.on(0).write_outer(outer, written)])
        )
        expected = folder.fingerprint(
            EXPORT_TASK, outer_done.digest, *(manifest.digest for manifest in layers)
        )
        return context.once(EXPORT_TASK, expected, lambda: _assemble_and_check(context, expected))


def _assemble_and_check(context: Context, expected: str) -> None:
    written = _assemble(context)
    job, model = context.job, model_folder(context.folder.path)
    parameters = footprint(
        context.checkpoint, context.plan.written_layers(job.export.pad), job
    ).parameters
    if written.model_type != context.checkpoint.model.model_type:
        context.executor.wait([context.executor.on(0).write_tokenizer()])
    context.executor.wait([context.executor.on(0).check_export(parameters)])
    files = sorted(str(file.relative_to(model)) for file in model.rglob("*") if file.is_file())
    commit(model, EXPORT_TASK, expected, files, {"parameters": parameters})


def _assemble(context: Context) -> Written:
    """Give every finished file its final name, then write config and, last, the index."""
    run, model, source = context.folder.path, model_folder(context.folder.path), context.checkpoint
    if model.is_dir():
        shutil.rmtree(model)  # what an unfinished attempt left
    there = context.plan.shape.remaining(source.num_layers)
    total = len(there) + 1
    finished = [task_folder(run, OUTER_TASK) / OUTER_FILE]
    finished += [task_folder(run, layer_task(layer)) / LAYER_FILE for layer in there]
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for file, name in zip(finished, names, strict=True):
        link_file(file, model / name)
    for file in side_files(source.path, COPIED):
        copy_file(file, model / file.relative_to(source.path))
    written = _write_config(context, model, there)
    write_index(model, names)
    return written


def _write_config(context: Context, model: Path, there: Sequence[int]) -> Written:
    """The patched config, of the layers that are there; where they differ in size, the class that
    builds them beside it.
    """
    export = context.job.export
    layers = context.plan.written_layers(export.pad)
    written = context.checkpoint.written(there, layers, export.target, export.dtype)
    write_json(model / "config.json", written.config)
    if written.code:
        write_text(model / f"{written.code.module}.py", written.code.text)
    return written


def write_index(model: Path, names: Sequence[str]) -> None:
    """Write the index of a folder over these files."""
    tensors = {tensor: info for name in names for tensor, info in read_header(model / name).items()}
    metadata = {
        "total_size": sum(info.num_bytes for info in tensors.values()),
        "total_parameters": sum(info.num_parameters for info in tensors.values()),
    }
    write_json(
        model / INDEX_NAME,
        {
            "metadata": metadata,
            "weight_map": {name: tensors[name].file for name in sorted(tensors)},
        },
    )
