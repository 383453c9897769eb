"""The stage in which models go on with the job's prompts, for a person to read side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt, file_digests
from rayprune.workers.store.files import Manifest, commit
from rayprune.workers.store.layout import samples_task
from rayprune.workers.store.side_files import side_files


def write_samples(
    context: Context, plan: Plan, models: Mapping[str, ModelAt], tokens: Manifest | None
) -> dict[str, Sequence[str]]:
    """What each model goes on with after every prompt, by the model's name; none where the plan has
    none.
    """
    planned = {name: model for name, model in models.items() if samples_task(name) in plan.tasks}
    if tokens is None or not planned:
        return {}
    with context.stage("samples", len(planned)):
        return {name: _written(context, name, model, tokens) for name, model in planned.items()}


def _written(context: Context, name: str, model: ModelAt, tokens: Manifest) -> Sequence[str]:
    # the tokens depend on the tokenizer; what ends a text stands in a file of its own
    ends = file_digests(side_files(model.path, ["generation_config.json"]))
    inputs = {"model": model.identity, "evaluation-tokens": tokens.digest, "ends": ends}
    task, executor = context.task(samples_task(name), inputs), context.executor

    def work() -> None:
        (receipt,) = executor.wait([executor.on(0).go_on(str(model.path))])
        commit(task, [], {"texts": receipt["texts"], "computed_on": executor.computed_on})

    found: Any = context.once(task, work).info["texts"]
    context.emit("step-finished", stage="samples", model=name)
    return tuple(found)
