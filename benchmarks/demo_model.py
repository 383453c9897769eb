"""Prune the demo model with a text of your own and record size, quality, time and memory in a dated file.

    python -m benchmarks.demo_model TEXT [--set a.b=c ...]

Calibrates on the first windows of TEXT (64 x 512 tokens unless overridden) and evaluates on its last fifth, in
1024-token windows. Writes benchmarks/results/demo-model_cpu_DATE.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result_file import record

HERE = Path(__file__).parent
JOB = HERE.parent / "examples" / "smollm2" / "job.yaml"
HELD_OUT_FRACTION = 0.2


def prune(text: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run the job in a process of its own; the report."""
    content = text.read_text(encoding="utf-8")
    held_out = folder / "held_out.txt"
    held_out.write_text(content[int(len(content) * (1 - HELD_OUT_FRACTION)) :], encoding="utf-8")
    settings = [f"calibration.path={text}", f"evaluation.path={held_out}", "evaluation.max_windows=null", *overrides]
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", str(JOB), "--out", str(folder / "run"), *words], check=True, cwd=HERE.parent
    )
    report: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return report


def body(report: dict[str, Any]) -> list[str]:
    """The result as lines of Markdown."""
    lines = ["| | before | after | after / before |", "|---|--:|--:|--:|"]
    for name in ("parameters", "decoder_parameters", "bytes_on_disk", "perplexity"):
        before, after = report[name]["before"], report[name]["after"]
        form = "{:.3f}" if name == "perplexity" else "{:,}"
        lines.append(f"| {name} | {form.format(before)} | {form.format(after)} | {after / before:.4f} |")
    protocol = report["evaluation"]
    lines += ["", f"Perplexity: last fifth of the text, {protocol['windows']} windows of {protocol['window']} tokens, "]
    lines[-1] += f"{protocol['scored_tokens']} scored tokens. Shape: {report['shape']}."
    lines += ["", "Seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in report["seconds"].items()) + "."]
    lines += [
        "",
        "Peak memory: " + ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in report["peak_memory_bytes"].items()) + ".",
    ]
    return lines


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = prune(options.text.absolute(), options.overrides, Path(folder))
    words = [options.text.name, *(word for setting in options.overrides for word in ("--set", setting))]
    command = "python -m benchmarks.demo_model " + shlex.join(words)
    record("demo-model_cpu", "Demo model", command, report["environment"], body(report))


if __name__ == "__main__":
    main()
