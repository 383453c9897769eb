"""Large shapes on a small machine: is the memory budget kept, is the plan's peak right, does time
per layer grow?

python -m benchmarks.memory llama-2-7b --models /data/models --runs /data/runs
python -m benchmarks.memory llama-3-70b --layers 2 --models ... --runs ...
python -m benchmarks.memory llama-2-7b --layers 2 --kv-groups 28 --method dress --models ...
python -m benchmarks.memory llama-2-7b --layers 2 --kv-groups 28 --sparsity 0.04 --evaluate ...
python -m benchmarks.memory qwen3-30b-a3b --layers 2 --experts 24 --sparsity 0.4 --models ...

Random weights (`benchmarks.random_model`), 4 x 512 calibration tokens, 20%, two Ray workers of 5
GiB and one thread each. `dress` trains every layer alone, one window at a time, and so does
`--recover` behind the cut. With `--evaluate` workers of their own measure perplexity, KL divergence
and agreement on 4 x 1024 tokens afterwards. A run that was interrupted goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmarks.random_model import SHAPES, write_model
from benchmarks.results import record, table
from rayprune.orchestrator.execution.run_folder import read_events
from rayprune.specs.sizes import parse_bytes

HERE = Path(__file__).parent
TRAINING = {"batch": 2, "epochs": 2}
EVALUATION = {"path": str(HERE.parent / "docs/architecture.md"), "window": 1024, "max_windows": 4}
METHODS = ("stat", "dress")


def job(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The job document."""
    text = Path(__file__).parent.parent / "README.md"
    training = TRAINING | {"dtype": options.dtype}
    dress = {"name": "dress", "scope": "layer", "training": training}
    return {
        "model": {"path": str(model)},
        "calibration": {"path": str(text), "samples": 4, "sequence_length": 512, "shards": 4},
        "budget": {
            "sparsity": options.sparsity,
            "kv_groups": options.kv_groups or "auto",
            "experts": options.experts,
        },
        "parallel": {"workers": 2, "placement": options.placement, "micro_batch": 1},
        "memory": {"worker": options.budget},
        "method": dress if options.method == "dress" else options.method,
        "recover": {"scope": "layer", **training} if options.recover else None,
    }


def layer_seconds(events: list[dict[str, Any]]) -> list[float]:
    """Seconds of every layer of the sweep, in layer order."""
    steps = {
        e["layer"]: e["seconds"]
        for e in events
        if e["event"] == "step-finished" and e.get("stage") == "sweep"
    }
    return [steps[layer] for layer in sorted(steps)]


def memory_table(peaks: dict[str, int], planned: int, budget: str) -> str:
    """What every process has used, and might."""
    allowed, rows = int(str(parse_bytes(budget))), []
    for name, peak in peaks.items():
        is_worker = name != "driver"
        limit, plans = (
            (f"{allowed / 2**30:.2f}", f"{planned / peak:.2f}") if is_worker else ("1.00", "")
        )
        rows.append([name, f"{peak / 2**30:.2f}", limit, plans])
    return table(["process", "peak private memory, GiB", "limit, GiB", "plan / measured"], rows)


def evaluated(run: Path, budget: str) -> str:
    """What the last attempt, the evaluation's, has used and found."""
    report, plan = (json.loads((run / file).read_text()) for file in ("report.json", "plan.json"))
    planned, events = sum(plan["memory_by_step"]["evaluate"].values()), read_events(run)
    starts = [number for number, e in enumerate(events) if e["event"] == "run-started"]
    peaks = Counter[str]()
    for event in events[starts[-1] :]:
        peaks |= Counter(event.get("peak_memory_bytes", {}))
    used, close = report["evaluation"], report["closeness"]["after"]
    return (
        f"Evaluation, {used['windows']} x {used['window']} tokens in"
        f" {report['seconds']['evaluate']:.0f} seconds: perplexity"
        f" {report['perplexity']['before']:.1f} to {report['perplexity']['after']:.1f}, KL"
        f" {close['divergence']:.4f}, agreement {close['agreement']:.1%}.\n\n"
        + memory_table(dict(peaks), planned, budget)
    )


def page(report: dict[str, Any], plan: dict[str, Any], seconds: list[float], budget: str) -> str:
    """The result as Markdown."""
    half = len(seconds) // 2
    parts = [memory_table(report["peak_memory_bytes"], plan["worker_memory_bytes"], budget)]
    parts.append(
        "Seconds: "
        + ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items())
        + "."
    )
    if half:
        medians = [statistics.median(part) for part in (seconds[:half], seconds[half:])]
        parts.append(
            "Seconds to a finished layer, median of the first and the second half:"
            f" {medians[0]:.1f}, {medians[1]:.1f}."
        )
    before, after = (report["decoder_parameters"][key] for key in ("before", "after"))
    parts.append(
        f"Decoder parameters {before:,} to {after:,}; shape {report['shape']}; `rayprune verify`"
        " accepts the result."
    )
    return "\n\n".join(parts)


def main() -> None:
    """Write the model if it is missing, run the job, verify it, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--models", type=Path, required=True, help="folder for the model")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run")
    parser.add_argument("--budget", default="5GiB", help="private memory of one worker")
    parser.add_argument(
        "--placement",
        choices=["layers", "shards"],
        help="default: layers; dress has a way of its own",
    )
    parser.add_argument("--method", choices=METHODS, default="stat")
    parser.add_argument(
        "--kv-groups", type=int, help="KV groups that stay; default: found by the probe"
    )
    parser.add_argument("--experts", type=int, help="experts that stay; default: all")
    parser.add_argument("--recover", action="store_true", help="train every layer alone behind it")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the training"
    )
    parser.add_argument("--evaluate", action="store_true", help="evaluate the result, streamed")
    parser.add_argument("--sparsity", type=float, default=0.2)
    options = parser.parse_args()
    if "model_type" in SHAPES[options.shape]:  # a mixture of experts
        options.placement = options.placement or "shards"
    options.placement = options.placement or ("layers" if options.method == "stat" else "shards")
    kind = options.method + ("-recovered" if options.recover else "")
    name = f"{options.shape}-{options.layers or SHAPES[options.shape]['num_hidden_layers']}-layers"
    model, run = (
        options.models.absolute() / name,
        options.runs.absolute() / f"{name}-{options.placement}-{kind}",
    )
    if not (model / "config.json").exists():
        write_model(options.shape, model, options.layers)
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    document = job(model, options)
    _run(path, document, run)
    report, plan = (json.loads((run / file).read_text()) for file in ("report.json", "plan.json"))
    found = page(report, plan, layer_seconds(read_events(run)), options.budget)
    if options.evaluate:
        _run(path, document | {"evaluation": EVALUATION}, run)
        found += "\n\n" + evaluated(run, options.budget)
    suffixes = [] if kind == "stat" else [kind]
    suffixes += ["evaluated"] if options.evaluate else []
    record("-".join([f"memory-{name}-{options.placement}", *suffixes]), found)


def _run(path: Path, document: dict[str, Any], run: Path) -> None:
    """Run a job, or go on, and verify the result."""
    path.write_text(yaml.safe_dump(document))
    for words in (["run", str(path), "--out", str(run)], ["verify", str(run)]):
        subprocess.run(
            [sys.executable, "-m", "rayprune.orchestrator.cli", *words], check=True, cwd=HERE.parent
        )


if __name__ == "__main__":
    main()
