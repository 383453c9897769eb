"""Several passes over a model, each over what the one before has left, and behind each a gate: how
close the model still is to the original, on text that nothing was decided by.

A pass has a scope of its own (`step-01`, ...). Its task `gate` is its record: what the pass has
left and what was measured of it. So the model of a pass may go once a later one has passed. The
last model that passes becomes the run's.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.shapes import Shape
from rayprune.orchestrator.planning.steps import nothing_to_remove, plan_job, step_job, step_words
from rayprune.orchestrator.stages import (
    evaluation,
    formats,
    lm_tasks,
    own_text,
    samples,
    source,
    texts,
)
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.prune import noting, prune
from rayprune.orchestrator.stages.subject import Measured, ModelAt, Pruned, file_digests, made_model
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.methods.options import InSteps
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import (
    FileRecord,
    Manifest,
    Task,
    commit,
    damaged_files,
    link_file,
    read_manifest,
    remove,
    remove_task,
)
from rayprune.workers.store.layout import (
    EXPORT_TASK,
    GATE_TASK,
    GATE_TOKENS_TASK,
    RECOVER_TASK,
    RECOVERY_TOKENS_TASK,
    TEACHER_TASK,
    TRAINED_FOLDER,
    Scope,
    gate_task,
    step_name,
)
from rayprune.workers.store.side_files import COPIED, side_files


def prune_in_steps(context: Context, plan: Plan, checkpoint: Checkpoint) -> Pruned:
    """All passes as far as the gate lets them: what came of the last one that has passed.

    Raises:
        SpecError: not even the first passes.
        RaypruneError: as its other subclasses say; finished tasks are kept.
    """
    steps = context.job.steps
    assert steps is not None
    context.record(plan)
    context.executor.use_model(context.job, checkpoint.path, context.scope.name)
    context = own_text.with_own_text(context, checkpoint)
    digests = texts.text_digests(context)
    tokens = texts.tokenize(context, checkpoint, digests, checkpoint)
    measured_on, more = texts.tokenize_gate(context, checkpoint, digests)
    plan = context.record(noting(context, plan, [*tokens.warnings, *more]))
    original = source.identify(context, checkpoint)
    given = {
        "original": original.identity,
        "beside the weights": file_digests(side_files(checkpoint.path, COPIED)),
        "calibration-tokens": tokens.calibration.digest,
        **({"recovery-tokens": tokens.recovery.digest} if tokens.recovery else {}),
        "gate-tokens": measured_on.digest,
        "texts": digests,
    }
    passes = _Passes(context, steps, original, given)
    closed = passes.run()
    plan = noting(context, plan, [*passes.left_out, *closed])
    last = passes.passed[-1]
    pruned = passes.export(last.number)
    formats.write_formats(context, pruned)
    context.executor.memory_on = lambda _: plan.memory
    context.executor.use_model(context.job, checkpoint.path, context.scope.name)
    models = {"before": original, "after": pruned}
    judged = evaluation.evaluate(context, models, tokens.evaluation)
    written = samples.write_samples(context, plan, models, tokens.evaluation)
    scores = lm_tasks.ask_models(context, models)
    record: Any = passes.records[last.number].info
    done = [gate_task(number) for number in passes.records]
    others = [task for task in plan.tasks if not task.endswith(f"/{GATE_TASK}")]
    plan = replace(plan, tasks=(*done, *others)).chosen(Shape(**record["result"]["shape"]))
    return Pruned(
        plan=context.record(plan),
        dense=original,
        pruned=pruned,
        recovered=None,
        layers=record["layers"],
        judged=judged,
        samples=written,
        scores=scores,
        allocation=record["allocation"],
        steps=tuple(passes.measured),
    )


@dataclass(frozen=True)
class _Made:
    """A model that a pass has left, and what was recorded of its files, by their names in it."""

    model: ModelAt
    files: Mapping[str, FileRecord]


class _Passes:
    """The passes of a run, one after the other."""

    def __init__(
        self, context: Context, steps: InSteps, original: ModelAt, given: Mapping[str, object]
    ) -> None:
        self._context, self._steps, self._original = context, steps, original
        self._given = given
        self.records: dict[int, Manifest] = {}
        """The task `gate` of every pass that was measured, by number."""
        self.measured: list[Measured] = []
        self.left_out: list[str] = []
        """Warnings about passes that had nothing to remove."""

    @property
    def passed(self) -> list[Measured]:
        """Those that the gate has let pass."""
        return [step for step in self.measured if not step.exceeded]

    def run(self) -> list[str]:
        """Prune and measure, step by step; why it ended early, if it did.

        Raises:
            SpecError: not even the first passes the gate.
        """
        for number in range(1, len(self._steps.sparsities) + 1):
            if (step := self._measured(number)) is None:
                self.left_out.append(nothing_to_remove(self._steps, number))
                continue
            self.measured.append(step)
            self._context.emit("step-measured", of=len(self._steps.sparsities), **asdict(step))
            if step.exceeded:
                return [self._closed(step)]
            self._forget([n for n in self.records if n < number])
        return []

    def _closed(self, step: Measured) -> str:
        words = f"{step_words(self._steps, step.number)}: {', '.join(step.exceeded)}"
        if not self.passed:
            raise SpecError(
                f"method.gate: closed at {words}; no step has passed: begin with less"
                " (method.steps, method.schedule), loosen the bound, or see to a better step"
                " (more calibration.samples, correction.drift, recover, another method.inner)"
            )
        last = self.passed[-1]
        return (
            f"the gate closed at {words}; the model is that of step {last.number}, with"
            f" {last.removed:.1%} removed"
        )

    # one pass

    def _scoped(self, number: int) -> Context | None:
        """The context of a pass; None where nothing is left for it to remove."""
        behind = [step for step in self.measured if step.number < number]
        dense = self._original.checkpoint.decoder_parameters
        current = behind[-1].decoder_parameters if behind else dense
        job = step_job(self._context.job, number, dense, current)
        if job is None:
            return None
        scope = Scope(self._context.scope.run, step_name(number))
        return replace(self._context, job=job, scope=scope)

    def _measured(self, number: int) -> Measured | None:
        """A pass that is done and measured, now or earlier; None where it has nothing to remove."""
        if (context := self._scoped(number)) is None:
            return None
        before = [*self.records.values()]
        inputs = {**self._given, "before": before[-1].digest if before else ""}
        task = context.task(GATE_TASK, inputs)
        done = context.once(task, partial(self._prune_and_measure, context, number, task))
        self.records[number] = done
        result: Any = done.info["result"]
        values = {name: result[name] for name in ("perplexity", "divergence", "agreement")}
        left = result["decoder_parameters"]
        return Measured(
            number=number,
            sparsity=self._steps.sparsities[number - 1],
            removed=1 - left / self._original.checkpoint.decoder_parameters,
            decoder_parameters=left,
            parameters=result["parameters"],
            exceeded=tuple(self._steps.gate.exceeded(**values)),
            **values,
        )

    def _prune_and_measure(self, context: Context, number: int, task: Task) -> None:
        done = self._prune(context, number)
        made = self._found(number)
        assert made is not None, f"{context.scope.name} left no model"
        checkpoint = made.model.checkpoint
        result = {
            **self._compare(context, made.model),
            "shape": asdict(done.plan.shape),
            "decoder_parameters": checkpoint.decoder_parameters,
            "parameters": checkpoint.parameters,
            "model": made.model.outer_digest,
        }
        told = {"layers": list(done.layers), "allocation": done.allocation}
        computed_on = context.executor.computed_on
        commit(task, [], {"result": result, **told, "computed_on": computed_on})

    def _prune(self, context: Context, number: int) -> Pruned:
        """The pass itself, over the model before it, whose files its own context watches."""
        model = self._before(number)
        executor = context.executor
        plan = plan_job(context.job, model.checkpoint, device=executor.device_kind)
        own = [task for task in plan.tasks if task not in (RECOVERY_TOKENS_TASK, TEACHER_TASK)]
        plan = replace(plan, tasks=tuple(own))  # those are of all passes
        executor.memory_on = lambda _: plan.memory
        return prune(replace(context, watched=[]), plan, model.checkpoint, self._original)

    def _compare(self, context: Context, model: ModelAt) -> dict[str, float]:
        """What the gate looks at; the same for any number of workers."""
        executor, count = context.executor, self._steps.gate.samples
        tokens = str(self._context.scope.folder(GATE_TOKENS_TASK))
        length = self._context.job.calibration.sequence_length
        with context.stage("gate", 1):
            calls = [
                executor.on(worker).compare(
                    str(self._original.path), str(model.path), tokens, owned, length
                )
                for worker, owned in executor.shares(count)
            ]
            windows = [each for receipt in executor.wait(calls) for each in receipt["windows"]]
        predicted: int = sum(window["tokens"] for window in windows)

        def mean(name: str) -> float:
            return math.fsum(window[name] for window in windows) / predicted

        risen = mean("loss") - mean("original_loss")
        found = {
            "perplexity": math.exp(min(risen, evaluation.MOST_NATS)),
            "divergence": mean("divergence"),
            "agreement": mean("agreed"),
        }
        if not all(map(math.isfinite, found.values())):
            raise ModelError(
                f"{model.path}: its predictions are not finite numbers; set model.dtype: float32"
            )
        return found

    # models of passes

    def _before(self, number: int) -> ModelAt:
        """The model that a pass prunes."""
        below = [n for n in self.records if n < number]
        return self._behind(below[-1]).model if below else self._original

    def _behind(self, number: int) -> _Made:
        """What a pass has left; where it is damaged or gone, it is made again."""
        made = self._found(number)
        result: Any = self.records[number].info["result"]
        if made is None or made.model.outer_digest != result["model"]:
            context = self._scoped(number)
            assert context is not None
            self._prune(context, number)
            made = self._found(number)
        assert made is not None, f"{step_name(number)} left no model"
        return made

    def _found(self, number: int) -> _Made | None:
        """What a pass has left, if all of it is there."""
        recovers = self._context.job.recover is not None
        scope = Scope(self._context.scope.run, step_name(number))
        folder = scope.folder(RECOVER_TASK if recovers else EXPORT_TASK)
        done = read_manifest(folder)
        if done is None or damaged_files(folder, done):
            return None
        inside = f"{TRAINED_FOLDER}/" if recovers else ""
        files = {name: record for name, record in done.files.items() if name.startswith(inside)}
        return _Made(
            made_model(folder / inside, done),
            {name.removeprefix(inside): record for name, record in files.items()},
        )

    def export(self, number: int) -> ModelAt:
        """The model of a pass as the run's model; then the passes' own go, unless they are kept."""
        context = self._context
        record = self.records[number].digest
        task = context.task(EXPORT_TASK, {"step": record})
        done = context.once(task, partial(self._export, number, task))
        self._forget([*self.records])
        shutil.rmtree(context.scope.cache, ignore_errors=True)
        return made_model(task.folder, done)

    def _export(self, number: int, task: Task) -> None:
        made = self._behind(number)
        remove_task(task.folder)
        for name in made.files:
            link_file(made.model.path / name, task.folder / name)
        parameters = made.model.checkpoint.parameters
        commit(task, made.files, {"parameters": parameters}, made.files)

    def _forget(self, numbers: Sequence[int]) -> None:
        """Remove all that passes have left but their records, unless it is kept."""
        if self._steps.keeps:
            return
        for number in numbers:
            about = Scope(self._context.scope.run, step_name(number)).about
            for place in sorted(about.iterdir()):
                if place.is_dir() and place.name != GATE_TASK:
                    remove_task(place)
                elif place.is_file():
                    remove(place)
