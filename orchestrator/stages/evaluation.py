"""The stage that judges models: by perplexity, or of an encoder by its embeddings of texts and by
the tokens that it predicts where they are masked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayprune.orchestrator.execution.steps import Call, Steps
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt
from rayprune.specs.errors import ModelError
from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.store.files import Manifest, commit
from rayprune.workers.store.layout import EVALUATION_TASK

MOST_NATS = 700.0
"""Of a mean loss: e to the power of more is no fp64 number."""
DENSE = "before"
Step = Callable[[Steps, str, tuple[int, int]], Call[None]]
Judge = Callable[[str, ModelAt, int], dict[str, float]]


def evaluate(
    context: Context, models: Mapping[str, ModelAt], tokens: Manifest | None
) -> dict[str, dict[str, float]] | None:
    """What was measured of models by name (the dense one is `before`) under the same code: their
    perplexity and how close they are to the dense one, or what an encoder has kept.
    """
    if tokens is None:
        return None
    described = models[DENSE].checkpoint.model
    judge = _Judge(context, models[DENSE])
    judged, ways = dict(models), [judge.perplexity]
    if not described.causal:
        ways = [judge.masked_loss] if described.predicts_masked else []
        if not ways:
            del judged[DENSE]
        ways.append(judge.likeness)
    with context.stage("evaluate", len(judged)):
        results: dict[str, dict[str, float]] = {}
        for name, model in judged.items():
            results[name] = _once(context, f"evaluate-{name}", models, model, tokens, ways)
            context.emit("step-finished", stage="evaluate", model=name, **results[name])
    return results


def doubts(losses: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    """Warnings about a recovery that ends where it should not."""
    found = {name: values.get("perplexity", 0.0) for name, values in (losses or {}).items()}
    if found.get("recovered", 0.0) <= found.get("after", 0.0):
        return []
    return [
        f"recovery made the model worse: perplexity {found['after']:.4g} before it,"
        f" {found['recovered']:.4g} after it; lower recover.learning_rate, train on text of the"
        " evaluation's kind, or leave recover out"
    ]


def _once(
    context: Context,
    name: str,
    models: Mapping[str, ModelAt],
    model: ModelAt,
    tokens: Manifest,
    ways: Sequence[Judge],
) -> dict[str, float]:
    """One model, judged in these ways, as one task."""
    shape: Any = tokens.info["shape"]
    inputs = {"model": model.identity, "evaluation-tokens": tokens.digest}
    if model is not models[DENSE] or not model.checkpoint.model.causal:
        inputs["dense"] = models[DENSE].identity
    task = context.task(name, inputs)

    def work() -> None:
        result: dict[str, float] = {}
        for way in ways:
            result |= way(name, model, shape[0])
        result["windows"] = shape[0]
        commit(task, [], {"result": result, "computed_on": context.executor.computed_on})

    return context.once(task, work).info["result"]  # type: ignore[return-value]


class _Judge:
    """Ways to judge a model on so many evaluation windows."""

    def __init__(self, context: Context, dense: ModelAt) -> None:
        self._context, self._dense = context, dense

    def perplexity(self, name: str, model: ModelAt, windows: int) -> dict[str, float]:
        """Of a causal language model; of another than the dense one also how close its next-token
        distributions are to that one's: KL divergence (nats) and agreement on the likeliest token.
        """
        if model is self._dense:
            mean, scored = self._mean_loss(name, Steps.evaluate, model, windows)
            return self._told(model, mean) | {"scored_tokens": scored}
        found = self._of_windows(name, self._compare, "windows", model, windows)
        scored = sum(window["tokens"] for window in found)
        mean, divergence, agreement = (
            math.fsum(window[key] for window in found) / scored
            for key in ("loss", "divergence", "agreed")
        )
        told = self._told(model, mean) | {"scored_tokens": scored}
        return told | {"divergence": divergence, "agreement": agreement}

    def _compare(self, steps: Steps, path: str, owned: tuple[int, int]) -> Call[None]:
        spec = self._context.job.evaluation
        assert spec is not None
        tokens = str(self._context.scope.folder(EVALUATION_TASK))
        return steps.compare(str(self._dense.path), path, tokens, owned, spec.effective_stride)

    @staticmethod
    def _told(model: ModelAt, mean: float) -> dict[str, float]:
        if not mean < MOST_NATS:
            raise ModelError(
                f"{model.path}: its mean loss is {mean:.4g} nats for a token, it predicts nothing;"
                " too high a learning_rate?"
            )
        return {"perplexity": math.exp(mean)}

    def masked_loss(self, name: str, model: ModelAt, windows: int) -> dict[str, float]:
        """Nats for a token that is masked."""
        mean, scored = self._mean_loss(name, Steps.unmask, model, windows)
        return {"masked_lm_loss": mean, "scored_tokens": scored}

    def likeness(self, name: str, model: ModelAt, windows: int) -> dict[str, float]:
        """Cosines of embeddings with the dense model's: the mean, and the least of all windows."""
        if model is self._dense:
            return {}
        found = self._of_windows(name, Steps.embed, "cosines", model, windows)
        return {"cosine": math.fsum(found) / windows, "least_cosine": min(found)}

    def _mean_loss(self, name: str, step: Step, model: ModelAt, windows: int) -> tuple[float, int]:
        losses = self._of_windows(name, step, "losses", model, windows)
        scored = sum(count for _, count in losses)
        return math.fsum(loss for loss, _ in losses) / max(scored, 1), scored

    def _of_windows(
        self, name: str, step: Step, key: str, model: ModelAt, windows: int
    ) -> list[Any]:
        """What a step tells of every window; each worker has a share, and goes through the layers
        with as many of them as it takes together anyway.
        """
        executor, found = self._context.executor, list[Any]()
        shares = executor.shares(windows)
        for first in range(0, shares[0][1][1], EVALUATED_AT_ONCE):
            calls = [
                step(
                    executor.on(worker),
                    str(model.path),
                    (start + first, min(start + first + EVALUATED_AT_ONCE, stop)),
                )
                for worker, (start, stop) in shares
                if start + first < stop
            ]
            found += [value for receipt in executor.wait(calls) for value in receipt[key]]
            if len(found) < windows:
                self._context.emit(
                    "windows-evaluated",
                    stage="evaluate",
                    model=name.removeprefix("evaluate-"),
                    done=len(found),
                    of=windows,
                )
        return found
