"""The stage that measures perplexities."""

import math
from collections.abc import Mapping
from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt
from rayprune.specs.errors import ModelError
from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.store.files import Manifest, commit

MOST_NATS = 700.0
"""Of a mean loss: e to the power of more is no fp64 number."""


def evaluate(
    context: Context, models: Mapping[str, ModelAt], tokens: Manifest | None
) -> dict[str, dict[str, float]] | None:
    """Perplexity of models by name (the dense one is `before`) under the same code, with its token
    count.
    """
    if tokens is None:
        return None
    with context.stage("evaluate", len(models)):
        results: dict[str, dict[str, float]] = {}
        for name, model in models.items():
            results[name] = _perplexity(context, f"evaluate-{name}", model, tokens)
            context.emit("step-finished", stage="evaluate", model=name, **results[name])
    return results


def doubts(losses: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    """Warnings about a recovery that ends where it should not."""
    found = {name: values["perplexity"] for name, values in (losses or {}).items()}
    if found.get("recovered", 0.0) <= found.get("after", 0.0):
        return []
    return [
        f"recovery made the model worse: perplexity {found['after']:.4g} before it,"
        f" {found['recovered']:.4g} after it; lower recover.learning_rate, train on text of the"
        " evaluation's kind, or leave recover out"
    ]


def _perplexity(context: Context, name: str, model: ModelAt, tokens: Manifest) -> dict[str, float]:
    executor = context.executor
    shape: Any = tokens.info["shape"]
    inputs = {"model": model.identity, "evaluation-tokens": tokens.digest}
    task = context.task(name, inputs)

    def work() -> None:
        losses = _losses(context, name, model, shape[0])
        scored = sum(count for _, count in losses)
        mean = math.fsum(loss for loss, _ in losses) / scored
        if not mean < MOST_NATS:
            raise ModelError(
                f"{model.path}: its mean loss is {mean:.4g} nats for a token, it predicts nothing;"
                " too high a learning_rate?"
            )
        result = {"perplexity": math.exp(mean), "scored_tokens": scored, "windows": shape[0]}
        commit(task, [], {"result": result, "computed_on": executor.computed_on})

    return context.once(task, work).info["result"]  # type: ignore[return-value]


def _losses(context: Context, name: str, model: ModelAt, windows: int) -> list[tuple[float, int]]:
    """Negative log-likelihoods and tokens of every window; each worker has a share, and goes
    through the layers with as many of them as it takes together anyway.
    """
    executor, losses = context.executor, list[tuple[float, int]]()
    shares = executor.shares(windows)
    for first in range(0, shares[0][1][1], EVALUATED_AT_ONCE):
        calls = [
            executor.on(worker).evaluate(
                str(model.path), (start + first, min(start + first + EVALUATED_AT_ONCE, stop))
            )
            for worker, (start, stop) in shares
            if start + first < stop
        ]
        losses += [loss for receipt in executor.wait(calls) for loss in receipt["losses"]]
        if len(losses) < windows:
            context.emit(
                "windows-evaluated",
                stage="evaluate",
                model=name.removeprefix("evaluate-"),
                done=len(losses),
                of=windows,
            )
    return losses
