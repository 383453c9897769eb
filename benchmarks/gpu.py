"""The sweep on one GPU, without Ray or a network: seconds by kind of step, next to the floor that
the hardware sets.

    python -m benchmarks.gpu llama-2-7b [--layers 32] [--samples 128] [--sequence-length 2048]
    --folder /data

Random weights. The floor: matrix FLOPs over the measured rate, and weight bytes over the measured
bandwidth.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.random_model import SHAPES, write_model
from benchmarks.results import record, table
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.numerics.linalg import WIDE


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


def seconds_of(work: Any, device: torch.device) -> float:
    """Seconds of one call, after a first one that warms up."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: matrix @ matrix, device)


def floors(options: argparse.Namespace, device: torch.device) -> list[list[Any]]:
    """The least time of each kind of work on this device."""
    shape, tokens = SHAPES[options.shape], options.samples * options.sequence_length
    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    weights = options.layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * width)
    kept, fits = int(0.75 * width), 6
    forward, gram = 2 * tokens * weights, options.layers * tokens * width**2
    decide = options.layers * (width**3 / 3 + fits * (kept**3 / 3 + 4 * kept**2 * hidden))
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


def main() -> None:
    """Write the model if it is missing, run the sweep, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--placement", choices=["shards", "layers"], default="shards")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder for the model and the run"
    )
    options = parser.parse_args()
    options.layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
    folder = options.folder.absolute()
    model = folder / f"{options.shape}-{options.layers}-layers"
    if not (model / "config.json").exists():
        write_model(options.shape, model, options.layers)
    text = folder / "text.txt"
    words = (
        f"{number} men went to mow, went to mow a meadow. "
        for number in range(options.samples * options.sequence_length // 30)
    )
    text.write_text("".join(words))
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job(model, text, options)))
    report = run_job(
        load_job(path),
        folder / f"run-{int(time.time())}",
        lambda event: print(event["event"], event.get("layer", "")),
    )
    device = torch.device(options.device)
    steps = table(
        ["step", "seconds"], [[name, f"{value:.2f}"] for name, value in report.step_seconds.items()]
    )
    floor = table(["floor", "FLOPs", "measured rate, TFLOP/s", "seconds"], floors(options, device))
    peaks = ", ".join(
        f"{name} {value / 2**30:.2f} GiB" for name, value in report.peak_memory_bytes.items()
    )
    stages = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    record(
        f"gpu-{model.name}",
        f"{steps}\n\n{floor}\n\nStages, seconds: {stages}.\n\nPeak memory: {peaks}.",
        options.device,
    )


if __name__ == "__main__":
    main()
