"""The stage that measures perplexities."""

import math
from pathlib import Path
from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.specs.errors import ModelError
from rayprune.workers.store.files import Manifest, commit
from rayprune.workers.store.layout import model_folder, recovered_folder, task_folder
from rayprune.workers.store.shards import even_parts

MOST_NATS = 700.0
"""Of a mean loss: e to the power of more is no fp64 number."""


def evaluate(
    context: Context, exported: Manifest, recovered: Manifest | None, tokens: Manifest | None
) -> dict[str, dict[str, float]] | None:
    """Perplexity of the dense (`before`), the exported (`after`) and the recovered model under the
    same code, with its token count.
    """
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


def _perplexity(
    context: Context, task: str, model: Path, identity: str, tokens: Manifest
) -> dict[str, float]:
    spec, executor = context.job.evaluation, context.executor
    assert spec is not None
    shape: Any = tokens.info["shape"]
    part = {
        "stride": spec.effective_stride,
        "dtype": context.job.model.dtype,
        "device": context.job.parallel.device,
    }
    expected = context.folder.fingerprint(task, identity, tokens.digest, part=part)

    def work() -> None:
        parts = enumerate(even_parts(shape[0], executor.num_workers))
        calls = [
            executor.on(worker).evaluate(str(model), (part.start, part.stop))
            for worker, part in parts
        ]
        losses = [loss for receipt in executor.wait(calls) for loss in receipt["losses"]]
        scored = sum(count for _, count in losses)
        mean = math.fsum(loss for loss, _ in losses) / scored
        if not mean < MOST_NATS:
            raise ModelError(
                f"{model}: its mean loss is {mean:.4g} nats for a token, it predicts nothing; too"
                " high a learning_rate?"
            )
        result = {"perplexity": math.exp(mean), "scored_tokens": scored, "windows": shape[0]}
        commit(task_folder(context.folder.path, task), task, expected, [], {"result": result})

    return context.once(task, expected, work, redo_stale=True).info["result"]  # type: ignore[return-value]
