"""Prune the demo model with a text of your own and record size, quality, time and memory in a dated
file.

    python -m benchmarks.demo_model TEXT [--set a.b=c ...]

Calibrates on the first windows of TEXT (64 x 512 tokens unless overridden) and evaluates on its
last fifth, in 1024-token windows. Writes benchmarks/results/demo-model_cpu_DATE.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import record, table

HERE = Path(__file__).parent
JOB = HERE.parent / "examples" / "smollm2" / "job.yaml"
MODEL = JOB.parent / "model"
HELD_OUT_FRACTION = 0.2


def weights() -> dict[str, Any]:
    """The demo model's tensors, by name."""
    from safetensors.torch import load_file

    return {n: t for file in MODEL.glob("*.safetensors") for n, t in load_file(file).items()}


def run(settings: list[str], out: Path) -> dict[str, Any]:
    """Run the demo's job with other settings in a process of its own; the report."""
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "rayprune.orchestrator.cli",
            "run",
            str(JOB),
            "--out",
            str(out),
            *words,
        ],
        check=True,
        cwd=HERE.parent,
    )
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def first_part(text: Path, folder: Path) -> Path:
    """A text without its last fifth, in a file of its own."""
    content, part = text.read_text(encoding="utf-8"), folder / "calibration.txt"
    part.write_text(content[: int(len(content) * (1 - HELD_OUT_FRACTION))], encoding="utf-8")
    return part


def held_out(text: Path, folder: Path) -> Path:
    """The last fifth of a text, in a file of its own."""
    content, part = text.read_text(encoding="utf-8"), folder / "held_out.txt"
    part.write_text(content[int(len(content) * (1 - HELD_OUT_FRACTION)) :], encoding="utf-8")
    return part


def page(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    for name in ("parameters", "decoder_parameters", "bytes_on_disk", "perplexity"):
        before, after = report[name]["before"], report[name]["after"]
        form = "{:.3f}" if name == "perplexity" else "{:,}"
        rows.append([name, form.format(before), form.format(after), f"{after / before:.4f}"])
    protocol = report["evaluation"]
    evaluated = (
        f"Perplexity: last fifth of the text, {protocol['windows']} windows of {protocol['window']}"
        " tokens, "
    )
    evaluated += f"{protocol['scored_tokens']} scored tokens. Shape: {report['shape']}."
    seconds = (
        "Seconds: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items())
        + "."
    )
    memory = ", ".join(
        f"{name} {value / 2**30:.2f} GiB" for name, value in report["peak_memory_bytes"].items()
    )
    return "\n\n".join(
        [
            table(["", "before", "after", "after / before"], rows),
            evaluated,
            seconds,
            f"Peak private memory: {memory}.",
        ]
    )


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, part = options.text.absolute(), held_out(options.text, Path(folder))
        settings = [
            f"calibration.path={text}",
            f"evaluation.path={part}",
            "evaluation.max_windows=null",
            "budget.round_to=2",  # just the sparsity that is asked for, as in the other results
            *options.overrides,
        ]
        report = run(settings, Path(folder) / "run")
    record("demo-model", page(report))


if __name__ == "__main__":
    main()
