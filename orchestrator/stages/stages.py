"""The short stages around the sweep: tokens, the shape, perplexity."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.executor import Call
from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.orchestrator.planning.shapes import Shape
from rayprune.orchestrator.planning.workload import GRADIENT_WINDOWS_AT_ONCE
from rayprune.orchestrator.stages.allocate import allocate
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.export import TOKENIZER_FILES, side_files
from rayprune.specs.errors import ModelError
from rayprune.specs.job import TextSpec
from rayprune.workers.store.files import Manifest, commit, record_of
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    GRADIENTS_TASK,
    SHAPE_TASK,
    model_folder,
    recovered_folder,
    task_folder,
)
from rayprune.workers.store.shards import even_parts
from rayprune.workers.store.storage import marker_file

MOST_NATS = 700.0
"""Of a mean loss: e to the power of more is no fp64 number."""


def start(context: Context) -> None:
    """Start the workers, so that no other stage's time holds it; not when a report shows that all may be done."""
    if not (context.folder.path / REPORT_FILE).exists():
        with context.stage("start", 1):
            context.attempt("start", lambda: _start(context))


def _start(context: Context) -> None:
    """Start the workers and make sure that each sees the driver's run folder and model."""
    executor = context.executor
    executor.start(context.emit)
    with marker_file(context.folder.path) as marker:
        expected = {str(path): record_of(path) for path in (marker, context.checkpoint.path / "config.json")}
        executor.wait([executor.submit(worker, "check_storage", expected) for worker in range(executor.num_workers)])
    executor.wait([executor.submit(0, "check_head")])


def tokenize(context: Context) -> tuple[Manifest, Manifest | None]:
    """The calibration and the evaluation text as tokens, so that a text that will not do is found before any other work."""
    job, spec = context.job.calibration, context.job.evaluation
    cutting = job.model_dump(mode="json", include={"samples", "sequence_length"}) | {"texts": [_reading(text) for text in (job, *job.mix)]}
    with context.stage("tokenize", 1 + (spec is not None)):
        calibration = _tokens(context, CALIBRATION_TASK, cutting, [job.path, *(text.path for text in job.mix)])
        if spec is None:
            return calibration, None
        part = spec.model_dump(mode="json") | {"apart_from": context.job.windows_read}
        return calibration, _tokens(context, EVALUATION_TASK, part, [spec.path], calibration.digest, redo_stale=True)


def _reading(text: TextSpec) -> dict[str, Any]:
    """How a text is read, and its weight if it has one; where it lies does not matter."""
    return text.model_dump(mode="json", include={"format", "field", "weight"})


def _tokens(context: Context, task: str, part: dict[str, Any], texts: Sequence[str], *inputs: str, redo_stale: bool = False) -> Manifest:
    """Tokenise texts, once; depends on the texts, the tokenizer, the cutting and `inputs`, not on the rest of the job."""
    tokenizer = [record_of(file).sha256 for file in side_files(context.checkpoint.path, TOKENIZER_FILES)]
    digests = [record_of(Path(text)).sha256 if Path(text).is_file() else "" for text in texts]  # the worker reports a missing text
    expected = context.folder.fingerprint(task, *tokenizer, *digests, *inputs, part=part)
    submit = context.executor.submit
    return context.once(task, expected, lambda: context.executor.wait([submit(0, "tokenize", task, expected)]), redo_stale)


def measure_gradients(context: Context, tokens: Manifest) -> Manifest | None:
    """The root mean square of the loss's gradient at every consumer's input of the dense model, where the method asks for it."""
    if not context.job.gradient_windows:
        return None
    expected = context.folder.fingerprint(GRADIENTS_TASK, *context.inputs(tokens))
    return context.once(GRADIENTS_TASK, expected, lambda: _measure_gradients(context, expected))


def _measure_gradients(context: Context, expected: str) -> None:
    executor, count, at_once = context.executor, context.job.gradient_windows, GRADIENT_WINDOWS_AT_ONCE
    shares, measured = executor.shares(count), list[Call]()
    rounds = range(0, max(stop - start for _, (start, stop) in shares), at_once)
    with context.stage("gradients", len(rounds)):
        for done in rounds:
            parts = {worker: range(start, stop)[done : done + at_once] for worker, (start, stop) in shares}
            calls = [executor.submit(worker, "gradients", (part.start, part.stop)) for worker, part in parts.items() if part]
            executor.wait(calls)
            measured += calls
            windows, memory = sum(map(len, parts.values())), context.peak_memory_bytes()
            context.emit("step-finished", stage="gradients", windows=windows, peak_memory_bytes=memory)
        executor.wait([executor.submit(0, "write_gradients", expected, *(call.payload for call in measured))])


def choose_shape(context: Context, tokens: Manifest) -> Shape:
    """The shape with the least predicted output error: mean over probed layers of each group's squared relative error.

    The dense model is run on a few calibration windows; errors are those of the method's own selection and correction,
    on held-out windows. Where layers may differ, `rayprune.orchestrator.stages.allocate` decides.
    """
    if context.job.budget.per_layer:
        return allocate(context, tokens)
    if len(context.plan.shapes) == 1:
        return context.plan.shape
    expected = context.folder.fingerprint(SHAPE_TASK, *context.inputs(tokens))
    done = context.once(SHAPE_TASK, expected, lambda: _probe(context, expected))
    return Shape(**done.info["result"])  # type: ignore[arg-type]


def _probe(context: Context, expected: str) -> None:
    """Predict the errors of all open shapes and record the best."""
    plan, num_layers = context.plan, context.plan.model.num_layers
    probed = [part.start for part in even_parts(num_layers, min(context.job.budget.probe_layers, num_layers))]
    with context.stage("probe", len(probed)):
        predicted = [_probe_layer(context, layer) for layer in probed]
    errors = [sum(layer[index] for layer in predicted) / len(predicted) for index in range(len(plan.shapes))]
    best = plan.shapes[min(range(len(errors)), key=errors.__getitem__)]
    candidates = [asdict(shape) | {"predicted_error": error} for shape, error in zip(plan.shapes, errors, strict=True)]
    commit(task_folder(context.folder.path, SHAPE_TASK), SHAPE_TASK, expected, [], {"result": asdict(best), "candidates": candidates})
    context.emit("shape-chosen", **asdict(best), candidates=candidates)


def _probe_layer(context: Context, layer: int) -> list[float]:
    """Squared relative output error of every open shape at one layer, summed over its groups."""
    executor, samples = context.executor, context.job.budget.probe_samples
    held_out = max(1, samples // 4)
    collected = [executor.submit(worker, "probe", layer, owned, held_out) for worker, owned in executor.shares(samples)]
    executor.wait(collected)
    units = context.plan.model.units
    wanted = sorted({(name, kept) for shape in context.plan.shapes for name, kept in shape.kept.items() if kept < units[name]})
    payloads = [call.payload for call in collected]
    calls = [executor.submit(i % executor.num_workers, "predict", layer, *unit, held_out, *payloads) for i, unit in enumerate(wanted)]
    errors = dict(zip(wanted, (receipt["held_out_error"] ** 2 for receipt in executor.wait(calls)), strict=True))
    context.emit("step-finished", stage="probe", layer=layer, peak_memory_bytes=context.peak_memory_bytes())
    return [sum(errors.get(item, 0.0) for item in shape.kept.items()) for shape in context.plan.shapes]


def evaluate(
    context: Context, exported: Manifest, recovered: Manifest | None, tokens: Manifest | None
) -> dict[str, dict[str, float]] | None:
    """Perplexity of the dense (`before`), the exported (`after`) and the recovered model under the same code, with its token count."""
    if tokens is None:
        return None
    models = {
        "before": (context.original.path, context.original.identity),
        "after": (model_folder(context.folder.path), exported.digest),
    }
    if recovered:
        models["recovered"] = (recovered_folder(context.folder.path), recovered.digest)
    with context.stage("evaluate", len(models)):
        results: dict[str, dict[str, float]] = {}
        for name, (path, identity) in models.items():
            results[name] = _perplexity(context, f"evaluate-{name}", path, identity, tokens)
            context.emit("step-finished", stage="evaluate", model=name, **results[name])
    return results


def _perplexity(context: Context, task: str, model: Path, identity: str, tokens: Manifest) -> dict[str, float]:
    spec, executor = context.job.evaluation, context.executor
    assert spec is not None
    shape: Any = tokens.info["shape"]
    part = {"stride": spec.effective_stride, "dtype": context.job.model.dtype, "device": context.job.parallel.device}
    expected = context.folder.fingerprint(task, identity, tokens.digest, part=part)

    def work() -> None:
        parts = enumerate(even_parts(shape[0], executor.num_workers))
        calls = [executor.submit(worker, "evaluate", str(model), (part.start, part.stop)) for worker, part in parts]
        losses = [loss for receipt in executor.wait(calls) for loss in receipt["losses"]]
        scored = sum(count for _, count in losses)
        mean = math.fsum(loss for loss, _ in losses) / scored
        if not mean < MOST_NATS:
            raise ModelError(f"{model}: its mean loss is {mean:.4g} nats for a token, it predicts nothing; too high a learning_rate?")
        result = {"perplexity": math.exp(mean), "scored_tokens": scored, "windows": shape[0]}
        commit(task_folder(context.folder.path, task), task, expected, [], {"result": result})

    return context.once(task, expected, work, redo_stale=True).info["result"]  # type: ignore[return-value]
