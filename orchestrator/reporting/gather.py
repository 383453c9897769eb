"""From a job that is done to its report: what was measured on the way, and sizes read off the
exported folder.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from rayprune import __version__
from rayprune.orchestrator.execution.records import records, sealed
from rayprune.orchestrator.execution.run_folder import (
    BENCH_FILE,
    PAGE_FILE,
    REPORT_FILE,
    environment,
    seconds_per_stage,
)
from rayprune.orchestrator.hub.origin import origin_of
from rayprune.orchestrator.planning.footprint import saved_bytes
from rayprune.orchestrator.reporting.card import model_card
from rayprune.orchestrator.reporting.facts import (
    Change,
    Closeness,
    Dense,
    Embeddings,
    Evaluation,
    LayerReport,
    Models,
    OnText,
    OwnText,
    Sample,
    Score,
    Span,
    StepReport,
    Training,
)
from rayprune.orchestrator.reporting.html_report import html_report
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.reporting.speeds import Speeds, read_speeds
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.own_text import trained_text
from rayprune.orchestrator.stages.subject import Judged, Pruned
from rayprune.workers.store.files import fingerprint, read_manifest, write_json, write_text
from rayprune.workers.store.layout import (
    CARD_FILE,
    EVALUATION_TASK,
    EXPORT_TASK,
    JOB_FILE,
    LM_TASKS_TASK,
    OWN_TEXT_TASK,
    RECOVER_TASK,
    TOKENS_FILE,
    TRAINED_FOLDER,
    Scope,
    converted_task,
    model_folder,
    recovered_folder,
    step_name,
    task_folder,
)
from rayprune.workers.store.training_stage import read_log

TRAININGS = {
    "regularise": "regularise",
    "layers": "regularised-*",
    "gates": "gates-*",
    "updates": "updates",
    "recover": "recover",
    "recovered layers": "recovered-*",
}
"""The folders of every kind of training, by name."""
SHOWN_STEPS = 400
Found = Mapping[str, Judged]
"""What was measured of every model, by name."""


def write_report(context: Context, done: Pruned) -> Report:
    """Write the report of a job that is done, and what is made from it."""
    return publish(_gather(context, done))


def publish(report: Report) -> Report:
    """Write the models' cards, report.html, then report.json; returns the report."""
    for folder in report.model_folders:
        write_text(folder / CARD_FILE, model_card(report, folder == report.recovered_model))
    job = (report.run / JOB_FILE).read_text(encoding="utf-8")
    write_text(report.run / PAGE_FILE, html_report(report, job))
    content = sealed(report.to_dict() | {"records": records(report.run)})
    write_json(report.run / REPORT_FILE, content)
    return Report.model_validate({**content, "run": report.run})


def _gather(context: Context, done: Pruned) -> Report:
    run, plan, job, judged = context.folder.path, done.plan, context.job, done.judged or {}
    before, after = done.dense.checkpoint, done.pruned.checkpoint
    events = context.folder.events()
    seconds = seconds_per_stage(events)
    trained_on = trained_text(job)
    return Report(
        run=run,
        schema_version=1,
        rayprune_version=__version__,
        environment=environment(),
        models=_models(context, done),
        dense=_dense(done),
        finished=_finished(events),
        method=job.method.model_dump(mode="json"),
        shape=plan.shape.kept,
        narrowest=plan.shape.narrowest,
        allocation=done.allocation,
        dropped=done.dropped and dict(done.dropped),
        parameters=Change(before=before.parameters, after=after.parameters),
        decoder_parameters=Change(before=before.decoder_parameters, after=after.decoder_parameters),
        bytes_on_disk=Change(before=before.bytes_on_disk, after=after.bytes_on_disk),
        served_bytes=_served_bytes(done) if job.method.masks else None,
        **_measured(judged),
        texts=_on_texts(judged),
        samples=_samples(context, done),
        scores=_scores(done),
        evaluation=_evaluation(context, done),
        speeds=_speeds(context, after.identity),
        calibration=job.calibration.model_dump(mode="json"),
        own_text=_own_text(context),
        recovery=trained_on.model_dump(mode="json") if trained_on else None,
        warnings=plan.warnings,
        seconds=seconds | {"total": sum(seconds.values())},
        step_seconds=_step_seconds(events),
        timeline=timeline(events),
        peak_memory_bytes=_peaks(events),
        training=trainings(run, plan.tasks),
        steps=_steps_of(context, done, events),
        layers=tuple(
            LayerReport.model_validate({"layer": number, "groups": groups})
            for number, groups in enumerate(done.layers)
        ),
    )


def _served_bytes(done: Pruned) -> Change[int] | None:
    """Bytes of all weights where a GPU holds 2:4 matrices without their zeros; None: it holds
    none so.
    """
    before, after = (
        sum(info.num_bytes for info in model.checkpoint.tensors.values())
        for model in (done.dense, done.pruned)
    )
    saved = saved_bytes(done.pruned.checkpoint)
    return Change(before=before, after=after - saved) if saved else None


def _own_text(context: Context) -> OwnText | None:
    """What the model has written itself, where the job asks for it."""
    done = read_manifest(context.scope.folder(OWN_TEXT_TASK))
    if context.job.calibration.own is None or done is None:
        return None
    return OwnText.model_validate(done.info["result"])


def _speeds(context: Context, identity: str) -> Speeds | None:
    """What `rayprune bench` has measured of this model, told apart by its shapes and types."""
    file = context.folder.path / BENCH_FILE
    found = read_speeds(file)
    if found is None or identity in {model.identity for model in found.models}:
        return found
    context.emit("warning", text=f"{file}: is of a model of another shape, and left out")
    return None


def _measured(judged: Found) -> dict[str, Any]:
    """What an evaluation has found on all texts together, as the report tells it."""
    results = {name: each.result for name, each in judged.items()}
    found = {
        measure: {name: result[measure] for name, result in results.items()}
        for measure in ("perplexity", "masked_lm_loss")
        if any(measure in result for result in results.values())
    }
    told: dict[str, Any] = {"perplexity": None} | found
    told["closeness"] = {
        name: Closeness(divergence=result["divergence"], agreement=result["agreement"])
        for name, result in results.items()
        if "divergence" in result
    }
    after = results.get("after", {})
    if "cosine" not in after:
        return told
    alike = {name: after[name] for name in Embeddings.model_fields}
    return told | {"embeddings": Embeddings.model_validate(alike)}


def _on_texts(judged: Found) -> dict[str, dict[str, OnText]]:
    """The same of each text."""
    texts = dict.fromkeys(text for each in judged.values() for text in each.texts)
    return {
        text: {
            name: OnText.model_validate(each.texts[text])
            for name, each in judged.items()
            if each.texts[text]
        }
        for text in texts
    }


def _steps_of(
    context: Context, done: Pruned, events: Sequence[dict[str, Any]]
) -> tuple[StepReport, ...]:
    """The passes with the seconds that each has taken."""
    found = []
    for step in done.steps:
        scope = Scope(context.folder.path, step_name(step.number))
        own = [e for e in events if e.get("scope") == scope.name or e["event"] == "run-started"]
        folder = scope.folder(RECOVER_TASK if context.job.recover else EXPORT_TASK)
        folder = folder / TRAINED_FOLDER if context.job.recover else folder
        more = {
            "seconds": sum(seconds_per_stage(own).values()),
            "model": folder.relative_to(scope.run).as_posix() if folder.exists() else None,
        }
        found.append(StepReport.model_validate(asdict(step) | more))
    return tuple(found)


def _models(context: Context, done: Pruned) -> Models:
    run = context.folder.path

    def named(folder: Path) -> str:
        return folder.relative_to(run).as_posix()

    targets = context.job.converted
    return Models(
        pruned=named(model_folder(run)),
        recovered=named(recovered_folder(run)) if done.recovered else None,
        own_class=done.pruned.checkpoint.model.code is not None,
        auto_class=done.pruned.checkpoint.model.auto_class,
        exports={target: named(task_folder(run, converted_task(target))) for target in targets},
    )


def _dense(done: Pruned) -> Dense:
    checkpoint = done.dense.checkpoint
    origin = origin_of(checkpoint.path)
    return Dense(
        name=origin.name,
        hub_id=origin.hub_id,
        revision=origin.revision,
        licence=origin.licence,
        units=checkpoint.model.units,
    )


def _finished(events: Sequence[dict[str, Any]]) -> str:
    return datetime.fromtimestamp(events[-1]["time"], UTC).isoformat(timespec="seconds")


def trainings(run: Path, tasks: Collection[str]) -> dict[str, Training]:
    """Of every training among these tasks the steps (some, where they are many), the terms of its
    loss and its gradient's norm; gates one after another.

    Layers that were trained alone are one training, the mean over them.
    """
    found = {}
    for name, pattern in TRAININGS.items():
        folders = sorted((run / "tasks").glob(pattern))
        logs = [read_log(folder) for folder in folders if folder.name in tasks]
        if not any(logs):
            continue
        steps = [[line] for log in logs for line in log] if name == "gates" else _steps(logs)
        if steps:
            found[name] = _training(steps)
    return found


def _steps(logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    """What several trainings have logged of the steps that all of them know, in order."""
    by_step = [{line["step"]: line for line in log} for log in logs]
    common = set.intersection(*map(set, by_step))
    return [[lines[step] for lines in by_step] for step in sorted(common)]


def _training(steps: Sequence[Sequence[Mapping[str, Any]]]) -> Training:
    """The course of a training from the lines of each step."""
    shown = range(0, len(steps), -(-len(steps) // SHOWN_STEPS))
    others = ("step", "of", "tokens_per_second")
    terms = [
        term
        for term in steps[0][0]
        if term not in others and all(term in line for step in steps for line in step)
    ]
    curves = {
        term: [fmean(line[term] for line in steps[number]) for number in shown] for term in terms
    }
    if any(curves[term] == curves["loss"] for term in terms if term != "loss"):
        del curves["loss"]  # it has one term
    speed = fmean(line["tokens_per_second"] for step in steps for line in step)
    return Training(steps=shown, curves=curves, tokens_per_second=speed)


def _samples(context: Context, done: Pruned) -> tuple[Sample, ...]:
    prompts = context.job.evaluation.prompts if context.job.evaluation and done.samples else ()
    return tuple(
        Sample(prompt=prompt, texts={name: texts[at] for name, texts in done.samples.items()})
        for at, prompt in enumerate(prompts)
    )


def _scores(done: Pruned) -> tuple[Score, ...]:
    """A line for each task and metric, with the values of all models."""
    by_metric: dict[tuple[str, str], dict[str, Any]] = {}
    for model, scores in done.scores.items():
        for score in scores:
            told = {name: v for name, v in score.items() if name not in ("value", "stderr")}
            line = by_metric.setdefault(
                (score["task"], score["metric"]), told | {"values": {}, "stderr": {}}
            )
            line["values"][model] = score["value"]
            if score["stderr"] is not None:
                line["stderr"][model] = score["stderr"]
    return tuple(map(Score.model_validate, by_metric.values()))


def _evaluation(context: Context, done: Pruned) -> Evaluation | None:
    """The protocol behind what was measured: numbers from different protocols cannot be
    compared.
    """
    if context.job.evaluation is None or not done.judged:
        return None
    found = done.judged["after"].result
    counts = {key: found[key] for key in ("windows", "scored_tokens") if key in found}
    tokens = read_manifest(context.scope.folder(EVALUATION_TASK))
    inputs: Any = tokens.made_from["inputs"] if tokens else {}
    asked = read_manifest(context.scope.folder(LM_TASKS_TASK)) if done.scores else None
    return Evaluation.model_validate(
        context.job.evaluation.model_dump(mode="json")
        | {"stride": context.job.evaluation.effective_stride}
        | {"tokenizer": fingerprint(inputs.get("tokenizer"))}
        | (
            {"tokens": tokens.files[TOKENS_FILE].sha256, "opening": tokens.info["opening"]}
            if tokens
            else {}
        )
        | ({"lm_eval": asked.info["lm_eval"]} if asked else {})
        | counts
    )


def _step_seconds(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Those of the last attempt in which workers did any."""
    told = [found for event in events if (found := event.get("step_seconds"))]
    return told[-1] if told else {}


def timeline(events: Sequence[Mapping[str, Any]]) -> tuple[Span, ...]:
    """Every stage of every attempt, also one that was cut off, on a clock that stands still between
    attempts.
    """
    spans: list[Span] = []
    begun = end = 0.0  # of the attempt, and the last that is known of it
    stage: tuple[str, float] | None = None
    for event in events:
        begins = event["event"] == "run-started"
        begun = end if begins else begun
        now = max(end, begun + event.get("elapsed", 0.0))
        if stage and (begins or event["event"] == "stage-finished"):
            name, start = stage
            seconds = (end if begins else now) - start
            busy = event.get("busy_seconds", {})
            spans.append(Span(stage=name, start=start, seconds=seconds, busy=busy))
            stage = None
        if event["event"] == "stage-started":
            stage = event.get("stage", ""), now
        end = now
    return tuple(spans)


def _peaks(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Peak private memory over all attempts, in bytes."""
    peaks: dict[str, int] = {}
    for event in events:
        for name, value in event.get("peak_memory_bytes", {}).items():
            peaks[name] = max(peaks.get(name, 0), value)
    return peaks
