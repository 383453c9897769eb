"""Units that go before zeros are made: a pass that cuts, in the scope `widths`, then one over the
narrower model, whose matrices get the zeros.
"""

from dataclasses import replace

from rayprune.orchestrator.planning.masked import widths_job, zeros_job
from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.stages import texts
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.prune import begin, cut, noting
from rayprune.orchestrator.stages.subject import Pruned, Subject
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.layout import SOURCE_TASK, WIDTHS, Scope


def prune_and_mask(context: Context, plan: Plan, checkpoint: Checkpoint) -> Pruned:
    """Cut by the inner method, then make zeros in what it has left: the bytes of two runs, one
    after the other.

    Raises:
        RaypruneError: as its subclasses say; finished tasks are kept.
    """
    context, subject, evaluated = begin(context, plan, checkpoint)
    executor, original = context.executor, subject.model
    narrower = _narrowed(context, subject)
    job, model = zeros_job(context.job), narrower.pruned
    zeros = make_plan(job, model.checkpoint, device=executor.device_kind)
    executor.memory_on = lambda _: zeros.memory
    executor.use_model(job, model.path, context.scope.name)
    masked = replace(subject, plan=zeros, model=model)
    done = cut(replace(context, job=job), masked, evaluated, original)
    notes = [*narrower.plan.notes, *done.plan.notes]
    plan = noting(context, subject.plan.chosen(narrower.plan.shape), notes)
    layers = [{**units, **sites} for units, sites in zip(narrower.layers, done.layers, strict=True)]
    return replace(done, plan=context.record(plan), layers=layers)


def _narrowed(context: Context, subject: Subject) -> Pruned:
    """The first pass, over the model and the texts that the run has begun with."""
    scope, executor = Scope(context.scope.run, WIDTHS), context.executor
    cutting = replace(context, job=widths_job(context.job), scope=scope)
    model, shapes = subject.model, subject.plan.shapes
    checkpoint = model.checkpoint
    plan = make_plan(cutting.job, checkpoint, device=executor.device_kind, given=shapes)
    own = tuple(task for task in plan.tasks if task != SOURCE_TASK)  # the run has told it apart
    plan = replace(plan, tasks=own)
    executor.memory_on = lambda _: plan.memory
    executor.use_model(cutting.job, checkpoint.path, scope.name)
    tokens = texts.tokenize(cutting, checkpoint, subject.texts, checkpoint).calibration
    return cut(cutting, replace(subject, plan=plan, tokens=tokens), None, model)
