"""One sweep without Ray or a network: seconds by layer and step, next to the floors that the
hardware sets. A part of `benchmarks.gpu`.

Random weights. The floors: FLOPs of the matrix products over the rate at which this device
multiplies large square matrices.
"""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.linear_algebra import seconds
from benchmarks.random_model import SHAPES, num_parameters, write_model
from benchmarks.results import record, table, write
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.numerics.linalg import WIDE

DISK_FACTOR = 2.25
"""Disk that a sweep needs, in sizes of its model: the model, the pruned one, and room."""


def sweep(options: argparse.Namespace, layers: int) -> tuple[str, dict[str, float]]:
    """Write the model if it is missing, run the job, print and record; what came of it, and the
    seconds of a layer.
    """
    folder = options.folder.absolute()
    model = folder / f"{options.shape}-{layers}-layers"
    if reason := too_little_space(model, SHAPES[options.shape], layers):
        return f"left out: {reason}", {}
    name, start = f"gpu-{model.name}", time.monotonic()
    if not (model / "config.json").exists():
        write_model(options.shape, model, layers)
    writing = time.monotonic() - start
    print(f"{model.name} written in {writing:.1f} s", flush=True)
    progress = Progress(
        layers, partial(write, name, machine=options.device, folder=options.results)
    )
    run = folder / f"run-{layers}-layers-{int(time.time())}"
    report = run_job(load_job(job_file(model, options)), run, progress)
    content = page(options, progress.layers, report, writing)
    record(name, content, options.device, options.results)
    shutil.rmtree(run)
    return "done", {"layers": layers, "per_layer": per_layer(report, progress.layers, writing)}


def too_little_space(model: Path, shape: dict[str, Any], layers: int) -> str:
    """Why the disk is too small for a model, the pruned one and room; empty if it is not."""
    one, outer = num_parameters(shape)
    size, there = 2 * (layers * one + outer), (model / "config.json").exists()
    model.parent.mkdir(parents=True, exist_ok=True)
    need, have = (DISK_FACTOR - there) * size, shutil.disk_usage(model.parent).free
    if have >= need:
        return ""
    return f"{have / 1e9:.0f} GB free in {model.parent}, {need / 1e9:.0f} GB needed"


def job_file(model: Path, options: argparse.Namespace) -> Path:
    """Write the text and the job beside the model."""
    text, path = model.parent / "text.txt", model.parent / "job.yaml"
    words = (
        f"{number} men went to mow, went to mow a meadow. "
        for number in range(options.samples * options.sequence_length // 30 + 1)
    )
    text.write_text("".join(words))
    path.write_text(yaml.safe_dump(job(model, text, options)))
    return path


def job(model: Path, text: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The job document."""
    return {
        "model": {"path": str(model)},
        "calibration": {
            "path": str(text),
            "samples": options.samples,
            "sequence_length": options.sequence_length,
        },
        "budget": {"sparsity": 0.2, "kv_groups": SHAPES[options.shape]["num_key_value_heads"]},
        "parallel": {
            "workers": 1,
            "placement": options.placement,
            "device": options.device,
            "micro_batch": options.micro_batch,
        },
        "memory": {"checkpoint_layers": 0},
        "cluster": {"executor": "in-process"},
    }


@dataclass
class Progress:
    """Prints what a run tells, and writes its layers down as they are finished."""

    num_layers: int
    write: Callable[[str], object]
    layers: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event."""
        if event["event"] == "stage-finished":
            print(f"{event['stage']}: {event['seconds']:.1f} s", flush=True)
        if event["event"] != "step-finished" or event["stage"] != "sweep":
            return
        self.layers.append(event)
        steps = ", ".join(f"{name} {value:.2f}" for name, value in steps_of(event).items())
        print(f"layer {event['layer']}: {event['seconds']:.2f} s ({steps})", flush=True)
        under_way = f"Under way: {len(self.layers)} of {self.num_layers} layers."
        self.write(f"{layer_table(self.layers)}\n\n{under_way}")


def steps_of(event: dict[str, Any]) -> dict[str, float]:
    """Seconds of a layer by step."""
    steps: dict[str, float] = event.get("steps", {})
    return steps


def layer_table(layers: list[dict[str, Any]]) -> str:
    """Seconds of the first layers, the median of the others and the slowest of them, by step."""
    steps = list(steps_of(layers[-1]))  # a first layer has what comes before the sweep, too
    rows = [
        [each["seconds"], *(steps_of(each).get(name, 0.0) for name in steps)] for each in layers
    ]
    first, rest = rows[:3], rows[3:]
    named = [(f"{each['layer']}", row) for each, row in zip(layers, first, strict=False)]
    if rest:
        slowest = max(rest)
        number = layers[rows.index(slowest)]["layer"]
        middle = [statistics.median(column) for column in zip(*rest, strict=True)]
        named += [(f"median of {len(rest)} more", middle), (f"slowest of them, {number}", slowest)]
    return table(
        ["layer", "seconds", *steps],
        [[name, *(f"{value:.2f}" for value in row)] for name, row in named],
    )


def first_use(layers: list[dict[str, Any]]) -> str:
    """Layer 0 against the later ones."""
    median = statistics.median(each["seconds"] for each in layers[1:])
    return (
        f"Steady state, median of the layers from 1 on: {median:.2f} s. First use, layer 0 beyond"
        f" it: {layers[0]['seconds'] - median:.2f} s."
    )


def per_layer(report: Report, layers: list[dict[str, Any]], writing: float) -> float:
    """Seconds that one layer more would take: sweep, export and its random weights, of which as
    many are written at once as there are processors.
    """
    number = len(layers)
    later = statistics.median(each["seconds"] for each in layers[number > 1 :])
    swept = min(later, report.seconds["sweep"] / number)  # `layers` counts from the sweep's start
    written = writing / max(number + 1, os.cpu_count() or 1)
    return swept + report.seconds["export"] / number + written


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product."""
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(2))


def floors(options: argparse.Namespace, layers: int, device: torch.device) -> list[list[Any]]:
    """The least time of each kind of work on this device."""
    shape, tokens = SHAPES[options.shape], options.samples * options.sequence_length
    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    kept, fits = int(0.75 * width), 6
    forward = 2 * tokens * layers * num_parameters(shape)[0]
    gram = layers * tokens * width**2
    decide = layers * (width**3 / 3 + fits * (kept**3 / 3 + 4 * kept**2 * hidden))
    fast = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = {dtype: matrix_rate(dtype, device) for dtype in {fast, torch.float32, WIDE}}
    return [
        [name, f"{flops:.3g}", f"{rates[dtype] / 1e12:.3g}", f"{flops / rates[dtype]:.2f}"]
        for name, flops, dtype in (
            ("forward", forward, fast),
            ("statistics", gram, torch.float32),
            ("decisions", decide, WIDE),
        )
    ]


def page(
    options: argparse.Namespace, layers: list[dict[str, Any]], report: Report, writing: float
) -> str:
    """The result as Markdown."""
    steps = [[name, f"{value:.2f}"] for name, value in report.step_seconds.items()]
    floor = floors(options, len(layers), torch.device(options.device))
    stages = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    peaks = ", ".join(
        f"{name} {value / 2**30:.2f} GiB" for name, value in report.peak_memory_bytes.items()
    )
    parts = [
        layer_table(layers),
        # with `layers` all of them begin together
        first_use(layers) if options.placement == "shards" and len(layers) > 1 else "",
        table(["step, whole run", "seconds"], steps),
        table(["floor", "FLOPs", "measured rate, TFLOP/s", "seconds"], floor),
        f"Stages, seconds: {stages}. The random model before them: {writing:.1f}.",
        f"Peak memory: {peaks}.",
    ]
    return "\n\n".join(filter(None, parts))
