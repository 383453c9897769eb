"""The stage that judges models: by perplexity and by how close they are to the dense one, or of an
encoder by its embeddings of texts and by the tokens that it predicts where they are masked.

Every number is of all texts together, and of each by itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.steps import Call, Steps
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Judged, ModelAt
from rayprune.specs.errors import ModelError
from rayprune.specs.training import RecoverSpec
from rayprune.workers.machine.blocks import TOLD_AT_ONCE
from rayprune.workers.store.files import Manifest, commit
from rayprune.workers.store.layout import EVALUATION_TASK

MOST_NATS = 700.0
"""Of a mean loss: e to the power of more is no fp64 number."""
ROUNDING = 1.001
"""A measure that has grown by less has not changed."""
DENSE = "before"
Step = Callable[[Steps, str, tuple[int, int]], Call[None]]
Windows = Sequence[Any]
"""What a step has told of every window."""
Told = dict[str, Any]
Mean = Callable[[Windows], Told]


def evaluate(
    context: Context, models: Mapping[str, ModelAt], tokens: Manifest | None
) -> dict[str, Judged] | None:
    """What was measured of models by name (the dense one is `before`) under the same code: their
    perplexity and how close they are to the dense one, or what an encoder has kept.
    """
    if tokens is None:
        return None
    judge = _Judge(context, models, tokens)
    with context.stage("evaluate", len(judge.names)):
        found: dict[str, Judged] = {}
        # the dense one last: what the others are compared with says all of it
        for name in sorted(judge.names, key=lambda name: name == DENSE):
            found[name] = judge.judged(name)
            context.emit("step-finished", stage="evaluate", model=name, **found[name].result)
    return {name: found[name] for name in judge.names}


def doubts(judged: Mapping[str, Judged] | None, recover: RecoverSpec | None) -> list[str]:
    """Warnings about a recovery that ends where it should not, by what it was trained for."""
    by_text = recover is not None and recover.loss == "lm"
    measure = "perplexity" if by_text else "divergence"
    found = {name: each.result.get(measure, 0.0) for name, each in (judged or {}).items()}
    if found.get("recovered", 0.0) <= ROUNDING * found.get("after", 0.0):
        return []
    what = measure if by_text else "KL divergence"
    return [
        f"recovery made the model worse: {what} {found['after']:.4g} before it,"
        f" {found['recovered']:.4g} after it; lower recover.learning_rate, train on text of the"
        " evaluation's kind, or leave recover out"
    ]


class _Judge:
    """Judges models on the evaluation windows, each as one task."""

    def __init__(self, context: Context, models: Mapping[str, ModelAt], tokens: Manifest) -> None:
        assert context.job.evaluation is not None
        self._context, self._models, self._tokens = context, models, tokens
        self._stride = context.job.evaluation.effective_stride
        shape: Any = tokens.info["shape"]
        counts: Any = tokens.info.get("windows", [shape[0]])  # of the first versions
        self._windows = dict(zip(context.job.evaluation.by_name, counts, strict=True))
        self._described = models[DENSE].checkpoint.model
        self._of_dense: Told = {}
        """What was found of the dense model beside another one."""

    @property
    def names(self) -> list[str]:
        """The models that are judged: of a dense encoder there may be nothing to say."""
        has_loss = self._described.causal or self._described.predicts_masked
        return [name for name in self._models if has_loss or name != DENSE]

    def judged(self, name: str) -> Judged:
        """One model, judged now or earlier."""
        compares = self._described.causal
        inputs: dict[str, object] = {
            "model": self._models[name].identity,
            "evaluation-tokens": self._tokens.digest,
            "windows": self._windows,
        }
        if name != DENSE or not compares:
            inputs["dense"] = self._models[DENSE].identity
        task = self._context.task(f"evaluate-{name}", inputs)

        def work() -> None:
            told = self._compared(name) if compares else self._of_encoder(name)
            commit(task, [], told | {"computed_on": self._context.executor.computed_on})

        info: Any = self._context.once(task, work).info
        self._of_dense = info.get("dense", self._of_dense)
        return Judged(info["result"], info["texts"])

    def _compared(self, name: str) -> Told:
        """Of a causal language model; another one than the dense is compared with that."""
        if name == DENSE:
            return self._of_dense
        windows = self._of_windows(name, self._compare, "windows")
        path, dense = self._models[name].path, self._models[DENSE].path
        of_dense = self._told(windows, lambda some: _alone(some, "original_loss", dense))
        told = self._told(windows, lambda some: _beside(some, path), _sliced)
        return told | {"dense": of_dense}

    def _compare(self, steps: Steps, path: str, owned: tuple[int, int]) -> Call[None]:
        dense = str(self._models[DENSE].path)
        tokens = str(self._context.scope.folder(EVALUATION_TASK))
        starts = [0, *accumulate(self._windows.values())][:-1]
        return steps.compare(dense, path, tokens, owned, self._stride, starts)

    def _of_encoder(self, name: str) -> Told:
        """Its loss on masked tokens, if it predicts them, and its embeddings beside the dense
        model's.
        """
        ways: list[tuple[Step, str, Mean]] = []
        if self._described.predicts_masked:
            ways.append((Steps.unmask, "losses", _masked_loss))
        if name != DENSE:
            ways.append((Steps.embed, "cosines", _likeness))
        told: Told = {"result": {}, "texts": {text: {} for text in self._windows}}
        for step, key, mean in ways:
            found = self._told(self._of_windows(name, step, key), mean)
            told["result"] |= found["result"]
            for text, values in found["texts"].items():
                told["texts"][text] |= values
        return told

    def _told(self, windows: Windows, mean: Mean, more: Mean = lambda windows: {}) -> Told:
        """What windows mean: all of them, and those of each text, of which there is `more`."""
        texts, first = {}, 0
        for text, count in self._windows.items():
            of_text = windows[first : first + count]
            texts[text] = mean(of_text) | more(of_text) | {"windows": count}
            first += count
        return {"result": mean(windows) | {"windows": len(windows)}, "texts": texts}

    def _of_windows(self, name: str, step: Step, key: str) -> list[Any]:
        """What a step tells of every window; each worker has a share, and goes through the layers
        with as many of them as it takes together anyway.
        """
        executor, path = self._context.executor, str(self._models[name].path)
        found: dict[int, Any] = {}
        total = sum(self._windows.values())
        shares, at_once = executor.shares(total), TOLD_AT_ONCE[executor.device_kind]
        for first in range(0, shares[0][1][1], at_once):
            owned = {
                worker: (start + first, min(start + first + at_once, stop))
                for worker, (start, stop) in shares
                if start + first < stop
            }
            calls = [step(executor.on(worker), path, part) for worker, part in owned.items()]
            for part, receipt in zip(owned.values(), executor.wait(calls), strict=True):
                found |= dict(zip(range(*part), receipt[key], strict=True))
            if len(found) < total:
                self._context.emit(
                    "windows-evaluated", stage="evaluate", model=name, done=len(found), of=total
                )
        return [found[window] for window in range(total)]


def _mean(windows: Windows, key: str) -> tuple[float, int]:
    """Of sums over the tokens of windows the mean of a token, and how many tokens there are."""
    tokens = sum(window["tokens"] for window in windows)
    return math.fsum(window[key] for window in windows) / tokens, tokens


def _alone(windows: Windows, key: str, model: Path) -> Told:
    """Perplexity of a model by its losses.

    Raises:
        ModelError: it predicts nothing.
    """
    mean, scored = _mean(windows, key)
    if not mean < MOST_NATS:
        raise ModelError(
            f"{model}: its mean loss is {mean:.4g} nats for a token, it predicts nothing;"
            " too high a learning_rate?"
        )
    return {"perplexity": math.exp(mean), "scored_tokens": scored}


def _beside(windows: Windows, model: Path) -> Told:
    """Perplexity of a model, and how close its next-token distributions are to the dense one's: KL
    divergence (nats) and agreement on the likeliest token.
    """
    return _alone(windows, "loss", model) | _apart(windows)


def _sliced(windows: Windows) -> Told:
    """The same of some tokens, perplexity as a multiple of the dense model's."""
    names = dict.fromkeys(name for window in windows for name in window["slices"])
    slices = {}
    for name in names:
        of_slice = [found for window in windows if (found := window["slices"].get(name))]
        risen = _mean(of_slice, "loss")[0] - _mean(of_slice, "original_loss")[0]
        ratio = math.exp(min(risen, MOST_NATS))
        slices[name] = {"tokens": _mean(of_slice, "loss")[1], "ratio": ratio} | _apart(of_slice)
    return {"slices": slices}


def _apart(windows: Windows) -> Told:
    divergence, agreement = (_mean(windows, key)[0] for key in ("divergence", "agreed"))
    return {"divergence": divergence, "agreement": agreement}


def _masked_loss(windows: Windows) -> Told:
    """Nats for a token that is masked."""
    scored = sum(count for _, count in windows)
    mean = math.fsum(loss for loss, _ in windows) / max(scored, 1)
    return {"masked_lm_loss": mean, "scored_tokens": scored}


def _likeness(windows: Windows) -> Told:
    """Cosines of embeddings with the dense model's: the mean, and the least of all windows."""
    return {"cosine": math.fsum(windows) / len(windows), "least_cosine": min(windows)}
