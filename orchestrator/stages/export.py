"""The reducer: index, config, tokenizer and the exported folder's manifest. Weights are only given
their final names.

The folder loads with plain `from_pretrained` of the class that it names; the load gate proves it
before the task is finished.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayprune.orchestrator.planning.footprint import footprint
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt, Subject, digests, file_digests, made_model
from rayprune.specs.errors import VerificationError
from rayprune.workers.model.folder import INDEX_NAME, index_of, read_json
from rayprune.workers.model.form import AS_IT_IS
from rayprune.workers.model.older import TOKENIZER_CONFIG, tokenizer_readable_by_both
from rayprune.workers.model.rewrite import Written
from rayprune.workers.model.sparsity import SPARSITY_FILE, sparsity_document
from rayprune.workers.store.files import (
    FileRecord,
    Manifest,
    Task,
    commit,
    copy_file,
    link_file,
    remove_task,
    write_json,
    write_text,
)
from rayprune.workers.store.layout import EXPORT_TASK, OUTER_TASK, SOURCE
from rayprune.workers.store.side_files import COPIED, side_files


def export_model(context: Context, subject: Subject, layers: Sequence[Manifest]) -> ModelAt:
    """Assemble the pruned model from the finished layers and check that it loads.

    Raises:
        VerificationError: the folder does not load as planned.
    """
    model, executor = subject.model, context.executor
    with context.stage("export", 1):
        layers_written = subject.plan.written_layers(context.job.export.pad)
        alike = all(kept == layers_written[0] for kept in layers_written)
        stock = alike and model.checkpoint.model.is_stock(layers_written[0])
        written = layers_written[0] if stock else None
        form = model.checkpoint.form(written, context.job.export.form) if written else AS_IT_IS
        there = subject.plan.shape.remaining(model.checkpoint.num_layers)
        names = sorted(form.outer_shapes(model.checkpoint.model.outer))
        parts = {"layers": there} if model.checkpoint.model.layer_axes else {}
        outer = context.task(OUTER_TASK, {"model": model.outer_digest, "names": names, **parts})
        outer_done = context.once(
            outer, lambda: executor.wait([executor.on(0).write_outer(outer, written, there)])
        )
        _check_origin(context, model, [outer_done, *layers])
        inputs = {
            "headers": model.checkpoint.identity,
            "beside the weights": file_digests(side_files(model.path, COPIED)),
            "shape": asdict(subject.plan.shape),
            **digests([outer_done, *layers]),
        }
        task = context.task(EXPORT_TASK, inputs)
        done = context.once(
            task, lambda: _assemble_and_check(context, subject, task, [outer_done, *layers])
        )
    return made_model(task.folder, done)


def _check_origin(context: Context, model: ModelAt, parts: Sequence[Manifest]) -> None:
    """Check that all parts were cut from the values that the model has been told by: half of one
    and half of another would be a model of its own.

    Raises:
        VerificationError: one was not; it is removed.
    """
    digests = (model.outer_digest, *model.layer_digests) if model.identified else ()
    for part, digest in zip(parts, digests, strict=bool(digests)):
        if part.info.get(SOURCE) != digest:
            remove_task(context.scope.folder(part.task))
            raise VerificationError(
                f"{model.path}: {part.task} was cut from other values than the model holds; it is"
                " not kept: run the same command again once the model stays as it is"
            )


def _assemble_and_check(
    context: Context, subject: Subject, task: Task, parts: Sequence[Manifest]
) -> None:
    written, linked = _assemble(context, subject, parts)
    job, model, source = context.job, task.folder, subject.model.checkpoint
    layers = subject.plan.written_layers(job.export.pad)
    there = subject.plan.shape.remaining(source.num_layers)
    parameters = footprint(source, layers, job, there).parameters
    if written.model_type != source.model.model_type:
        context.executor.wait([context.executor.on(0).write_tokenizer()])
    context.executor.wait([context.executor.on(0).check_export(parameters)])
    files = sorted(str(file.relative_to(model)) for file in model.rglob("*") if file.is_file())
    commit(task, files, {"parameters": parameters}, linked)


def _assemble(
    context: Context, subject: Subject, parts: Sequence[Manifest]
) -> tuple[Written, dict[str, FileRecord]]:
    """Give every finished file its final name, then write config and, last, the index; what was
    recorded of the files.
    """
    scope, model, source = context.scope, context.scope.model, subject.model.checkpoint
    remove_task(model)  # what an unfinished attempt left
    there = subject.plan.shape.remaining(source.num_layers)
    finished = [
        (scope.folder(part.task) / name, record)
        for part in parts
        for name, record in part.files.items()
    ]
    total = len(finished)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for (file, _), name in zip(finished, names, strict=True):
        link_file(file, model / name)
    for file in side_files(source.path, COPIED):
        _copy(file, model / file.relative_to(source.path))
    written = _write_config(context, subject, there)
    if masks := context.job.method.masks:
        told: Any = [(part.info["groups"], part.info["zeros"]) for part in parts[1:]]
        write_json(model / SPARSITY_FILE, sparsity_document(masks, told))
    write_json(model / INDEX_NAME, index_of(model, names))
    return written, dict(zip(names, (record for _, record in finished), strict=True))


def _copy(file: Path, path: Path) -> None:
    """A file as it is, but for a tokenizer's config that transformers 4 would not read."""
    if file.name == TOKENIZER_CONFIG and (given := read_json(file)) != (
        readable := tokenizer_readable_by_both(given)
    ):
        write_json(path, readable)
    else:
        copy_file(file, path)


def _write_config(context: Context, subject: Subject, there: Sequence[int]) -> Written:
    """The patched config, of the layers that are there; where they differ in size, the class that
    builds them beside it.
    """
    model, export = context.scope.model, context.job.export
    layers = subject.plan.written_layers(export.pad)
    source = subject.model.checkpoint
    written = source.written(there, layers, export.form, export.dtype)
    write_json(model / "config.json", written.config)
    if written.code:
        write_text(model / f"{written.code.module}.py", written.code.text)
    return written
