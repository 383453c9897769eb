"""One pass over a model: have it write text, tokenise, tell it from others, measure gradients,
choose the shape, train, sweep, export, recover, evaluate.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.stages import (
    evaluation,
    export,
    formats,
    gradients,
    lm_tasks,
    own_text,
    probe,
    routed,
    samples,
    source,
    sweep,
    texts,
    training,
)
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt, Pruned, Subject
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Manifest, read_manifest
from rayprune.workers.store.layout import SHAPE_TASK


def prune(
    context: Context, plan: Plan, checkpoint: Checkpoint, original: ModelAt | None = None
) -> Pruned:
    """One pass over a model, in the context's scope: what came of it. The result is compared with
    the `original`, and a recovery learns from it, if not from the model that is pruned.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    context, subject, evaluated = begin(context, plan, checkpoint, original)
    return cut(context, subject, evaluated, original or subject.model)


def begin(
    context: Context, plan: Plan, checkpoint: Checkpoint, original: ModelAt | None = None
) -> tuple[Context, Subject, Manifest | None]:
    """The context with all texts, the model and its texts as tokens, and the tokens of the
    evaluation, if there is one.
    """
    context.record(plan)
    context.executor.use_model(context.job, checkpoint.path, context.scope.name)
    context = own_text.with_own_text(context, checkpoint)
    digests = texts.text_digests(context)
    first = original.checkpoint if original else checkpoint
    tokens = texts.tokenize(context, checkpoint, digests, first)
    plan = context.record(noting(context, plan, tokens.warnings))
    dense = source.identify(context, checkpoint)
    subject = Subject(plan, dense, tokens.calibration, tuple(digests), tokens.recovery)
    return context, subject, tokens.evaluation


def cut(
    context: Context, subject: Subject, evaluated: Manifest | None, original: ModelAt
) -> Pruned:
    """Choose a shape, train if the method does, and prune layer by layer."""
    plan = subject.plan
    subject = replace(subject, gradients=gradients.measure_gradients(context, subject))
    shape = probe.choose_shape(context, subject)
    subject = replace(subject, plan=context.record(plan.chosen(shape)))
    trained = training.train_first(context, subject)
    layers = sweep.prune_layers(context, trained)
    return end(context, trained, layers, evaluated, original)


def end(
    context: Context,
    subject: Subject,
    layers: Sequence[Manifest],
    evaluated: Manifest | None,
    original: ModelAt,
) -> Pruned:
    """From layers that are finished to a model that is exported, recovered and judged."""
    few = routed.few_tokens(layers, subject.model.checkpoint.model)
    pruned = export.export_model(context, subject, layers)
    recovered = training.recover(context, replace(subject, model=original), pruned)
    formats.write_formats(context, recovered or pruned)
    # it only serves what is not finished
    shutil.rmtree(context.scope.cache, ignore_errors=True)
    models = {"before": original, "after": pruned}
    models |= {"recovered": recovered} if recovered else {}
    judged = evaluation.evaluate(context, models, evaluated)
    written = samples.write_samples(context, subject.plan, models, evaluated)
    scores = lm_tasks.ask_models(context, models)
    final = noting(context, subject.plan, [*few, *evaluation.doubts(judged, context.job.recover)])
    allocation = _allocation(context)
    return Pruned(
        final, original, pruned, recovered, _groups(layers), judged, written, scores, allocation
    )


def noting(context: Context, plan: Plan, warnings: Sequence[str]) -> Plan:
    """The plan with warnings; those that are new are shown."""
    for warning in warnings:
        if warning not in plan.notes:
            context.emit("warning", text=warning)
    return plan.noting(warnings)


def _groups(layers: Sequence[Manifest]) -> list[Mapping[str, Any]]:
    """What was decided about the groups of every layer."""
    return [layer.info["groups"] for layer in layers]  # type: ignore[misc]


def _allocation(context: Context) -> dict[str, Any] | None:
    """How layers that differ got their sizes: what was predicted, measured and tried."""
    if not context.job.budget.per_layer:
        return None
    done = read_manifest(context.scope.folder(SHAPE_TASK))
    facts: Any = done.info["allocation"] if done else {}
    return {"name": context.job.budget.allocation.name, **facts}
