"""report.json and report.html: what was removed, what it cost, how good the result is; and the same
as tables.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from rayprune.orchestrator.execution.run_folder import (
    PAGE_FILE,
    REPORT_FILE,
    environment,
    seconds_per_stage,
)
from rayprune.orchestrator.reporting.html_report import html_report
from rayprune.orchestrator.reporting.progress import print_table
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Pruned
from rayprune.specs.errors import SpecError
from rayprune.workers.store.files import read_manifest, write_json, write_text
from rayprune.workers.store.layout import SHAPE_TASK, task_folder
from rayprune.workers.store.training_stage import read_log

TRAININGS = {
    "regularise": "regularise",
    "layers": "regularised-*",
    "gates": "gates-*",
    "updates": "updates",
    "recover": "recover",
}
"""The folders of every kind of training, by name."""
SHOWN_STEPS = 400
Losses = Mapping[str, Mapping[str, float]] | None


def write_report(context: Context, done: Pruned) -> dict[str, Any]:
    """Write report.html, then report.json; sizes are read off the exported folder, not the plan.
    Returns the report.
    """
    before, after, plan, losses = (
        done.dense.checkpoint,
        done.pruned.checkpoint,
        done.plan,
        done.losses,
    )
    events = context.folder.events()
    seconds = seconds_per_stage(events)
    report = {
        "schema_version": 1,
        "rayprune_version": version("rayprune"),
        "environment": environment(),
        "method": context.job.method.model_dump(mode="json"),
        "shape": plan.shape.kept,
        "narrowest": plan.shape.narrowest,
        "allocation": _allocation(context),
        "parameters": {"before": before.parameters, "after": after.parameters},
        "decoder_parameters": {
            "before": before.decoder_parameters,
            "after": after.decoder_parameters,
        },
        "bytes_on_disk": {"before": before.bytes_on_disk, "after": after.bytes_on_disk},
        "perplexity": (
            {name: result["perplexity"] for name, result in losses.items()} if losses else None
        ),
        "evaluation": _evaluation(context, losses),
        "calibration": context.job.calibration.model_dump(mode="json"),
        "warnings": list(plan.warnings),
        "seconds": seconds | {"total": sum(seconds.values())},
        "step_seconds": context.executor.step_seconds,
        "peak_memory_bytes": _peaks(events),
        "training": trainings(context.folder.path, plan.tasks),
        "layers": [
            {"layer": number} | {"groups": manifest.info["groups"]}
            for number, manifest in enumerate(done.layers)
        ],
    }
    write_text(context.folder.path / PAGE_FILE, html_report(report))
    write_json(context.folder.path / REPORT_FILE, report)
    return report


def trainings(run: Path, tasks: Collection[str]) -> dict[str, dict[str, Any]]:
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
        steps = (
            [[line] for log in logs for line in log]
            if name == "gates"
            else list(zip(*logs, strict=True))
        )
        shown = range(0, len(steps), -(-len(steps) // SHOWN_STEPS))
        terms = [term for term in steps[0][0] if term not in ("step", "of", "tokens_per_second")]
        curves = {
            term: [fmean(line[term] for line in steps[number]) for number in shown]
            for term in terms
        }
        if any(curves[term] == curves["loss"] for term in terms if term != "loss"):
            del curves["loss"]  # it has one term
        speed = fmean(line["tokens_per_second"] for step in steps for line in step)
        found[name] = {"steps": list(shown), "curves": curves, "tokens_per_second": speed}
    return found


def _allocation(context: Context) -> dict[str, Any] | None:
    """How layers that differ got their sizes: what was predicted, measured and tried."""
    if not context.job.budget.per_layer:
        return None
    done = read_manifest(task_folder(context.folder.path, SHAPE_TASK))
    facts: Any = done.info["allocation"] if done else {}
    return {"name": context.job.budget.allocation.name, **facts}


def _evaluation(context: Context, losses: Losses) -> dict[str, Any] | None:
    """The protocol behind the perplexities: numbers from different protocols cannot be compared."""
    if context.job.evaluation is None or losses is None:
        return None
    counts = {key: losses["before"][key] for key in ("windows", "scored_tokens")}
    return (
        context.job.evaluation.model_dump(mode="json")
        | {"stride": context.job.evaluation.effective_stride}
        | counts
    )


def _peaks(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Peak private memory over all attempts, in bytes."""
    peaks: dict[str, int] = {}
    for event in events:
        for name, value in event.get("peak_memory_bytes", {}).items():
            peaks[name] = max(peaks.get(name, 0), value)
    return peaks


def read_report(run: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        SpecError: there is none.
    """
    try:
        report: dict[str, Any] = json.loads((run / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise SpecError(
            f"{run}: no {REPORT_FILE} here; name the folder of a finished run"
        ) from None
    return report


def print_summary(report: dict[str, Any]) -> None:
    """Show what a run has achieved and cost."""
    rows = [
        _change(name, report[name], "{:,.0f}")
        for name in ("parameters", "decoder_parameters", "bytes_on_disk")
    ]
    if report["perplexity"]:
        rows.append(_change("perplexity", report["perplexity"], "{:.3f}"))
    print_table("result", ["", "before", "after", "after / before"], rows)
    if report["perplexity"] and (recovered := report["perplexity"].get("recovered")):
        print(
            f"perplexity after recovery: {recovered:.3f}"
            f" ({recovered / report['perplexity']['before']:.4f} of before)"
        )
    if protocol := report["evaluation"]:
        print(
            f"perplexity of {protocol['path']}: window {protocol['window']}, stride"
            f" {protocol['stride']}, ",
            end="",
        )
        print(f"{protocol['windows']} windows, {protocol['scored_tokens']} scored tokens")
    if allocation := report["allocation"]:
        shown = {
            key.replace("_", " "): value
            for key, value in allocation.items()
            if key not in ("name", "by_generation")
        }
        print(
            f"allocation: {allocation['name']}, "
            + ", ".join(f"{key} {value:.6g}" for key, value in shown.items())
        )
    print(
        "seconds: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items())
    )
    print(
        "peak memory: "
        + ", ".join(
            f"{name} {value / 2**30:.2f} GiB" for name, value in report["peak_memory_bytes"].items()
        )
    )


def print_layers(report: dict[str, Any]) -> None:
    """Show what was kept in every layer, and how well the correction reproduces what was cut."""
    columns = ["layer", "group", "kept", "damping", "training error", "held-out error"]
    print_table(
        "layers", columns, [row for layer in report["layers"] for row in _layer_rows(layer)]
    )


def _change(name: str, values: dict[str, float], form: str) -> list[str]:
    before, after = values["before"], values["after"]
    return [name, form.format(before), form.format(after), f"{after / before:.4f}"]


def _layer_rows(layer: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(layer["layer"]),
            name,
            f"{g['kept']}/{g['of']}",
            f"{g['damping']:g}",
            f"{g['training_error']:.4f}",
            f"{g['held_out_error']:.4f}",
        ]
        for name, g in layer["groups"].items()
    ]
