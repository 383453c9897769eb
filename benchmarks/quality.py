"""Every method and selector, and what others do, on the demo model with the same text and token counts: quality, size, time, memory.

    python -m benchmarks.quality TEXT [--sparsity 0.2 0.3 0.4] [--rows 'stat*' ...] [--jobs 2] [--work FOLDER] [--no-run]

Calibrates on the first windows of TEXT (64 x 512 tokens unless a row says otherwise) and evaluates on its last fifth and on a second
domain, CPython's help topics, in 1024-token windows. Rows that are in FOLDER already are not run again. Needs `pip install -e '.[bench]'`.
"""

import argparse
import fnmatch
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import BASELINES, MODEL
from benchmarks.demo_model import HELD_OUT_FRACTION, HERE, held_out, run
from benchmarks.results import RESULTS, record, table
from specs.job import EvaluationSpec
from workers.calibration import evaluation_windows, load_tokenizer
from workers.checkpoint import open_checkpoint
from workers.evaluate import window_losses

ALIKE = ("budget.kv_groups=3", "budget.round_to=2")
"""One width for all layers, to the channel."""
PER_LAYER = ("budget.per_layer=true", "budget.round_to=16")
THRESHOLD = (*PER_LAYER, "budget.allocation=threshold")
UNCORRECTED = ("correction.damping=1e6",)
DRIFT = ("correction.drift=0.5",)
ALL_TOKENS = ("calibration.samples=392",)
"""All of the first 80% of WikiText-2's validation text, but for a rest."""
OTHERS = {"torch-pruning, magnitude": "magnitude", "torch-pruning, Taylor": "taylor", "block influence (ShortGPT)": "block-influence"}
METHODS: dict[str, tuple[str, ...]] = {
    "stat, drift, curves": (*PER_LAYER, *DRIFT),
    "stat, drift": (*ALIKE, *DRIFT),
    "stat": ALIKE,
    "numerical, threshold (Numerical Pruning)": (*THRESHOLD, "method=numerical"),
    "flap, threshold, uncorrected (FLAP without its bias)": (*THRESHOLD, *UNCORRECTED, "budget.kv_groups=3", "method=flap"),
    "wanda, uncorrected (Wanda-sp)": (*ALIKE, *UNCORRECTED, "method=wanda"),
    "obs": (*ALIKE, "method=obs"),
}
"""Run at every sparsity, as is what others do."""
ABLATIONS: dict[str, tuple[str, ...]] = {
    "stat, drift, all tokens": (*ALIKE, *DRIFT, *ALL_TOKENS),
    "obs, drift": (*ALIKE, *DRIFT, "method=obs"),
    "flap": (*ALIKE, "method=flap"),
    "numerical": (*ALIKE, "method=numerical"),
    "stat, uncorrected": (*ALIKE, *UNCORRECTED),
    "stat, damping 1e-4": (*ALIKE, "correction.damping=1e-4"),
    "stat, dense path": (*ALIKE, "parallel.placement=layers"),
    "stat, 16 x 512 tokens": (*ALIKE, "calibration.samples=16"),
    "stat, 160 x 512 tokens": (*ALIKE, "calibration.samples=160"),
    "stat, drift, search": (*PER_LAYER, *DRIFT, "budget.allocation=search"),
}
"""What one thing changes; run at the first sparsity."""
ROWS = METHODS | ABLATIONS


@dataclass(frozen=True)
class Case:
    """One row at one sparsity."""

    name: str
    sparsity: float
    text: Path
    work: Path

    @property
    def file(self) -> Path:
        return self.work / f"{self.name.replace(' ', '-').replace(',', '')}-{self.sparsity}.json"


def perplexity(model: Path, texts: dict[str, Path]) -> dict[str, float]:
    """By text: 1024-token windows, the first 52 (a fifth of WikiText-2's validation text)."""
    found = {}
    for name, text in texts.items():
        windows_NT = evaluation_windows(EvaluationSpec(path=str(text), max_windows=52), load_tokenizer(model))
        losses = window_losses(model, windows_NT, 0, windows_NT.shape[1], torch.float32, torch.device("cpu"), lambda tensor: tensor)
        found[name] = math.exp(math.fsum(loss for loss, _ in losses) / sum(count for _, count in losses))
    return found


def pruned(case: Case, folder: Path) -> dict[str, Any]:
    """Prune as a row says, in a process of its own: the model's folder, seconds of pruning, peak memory of the process that computes."""
    if case.name in OTHERS:
        words = [OTHERS[case.name], str(case.text), "--sparsity", str(case.sparsity), "--out", str(folder / "model")]
        subprocess.run([sys.executable, "-m", "benchmarks.baselines", *words], check=True, cwd=HERE.parent)
        facts: dict[str, Any] = json.loads((folder / "model" / "baseline.json").read_text())
        return facts
    settings = [f"calibration.path={case.text}", "evaluation=null", f"budget.sparsity={case.sparsity}", "cluster.executor=in-process"]
    report = run([*settings, "parallel.workers=1", *ROWS[case.name]], folder)
    shutil.rmtree(folder / "tasks")
    seconds = report["seconds"]["total"] - report["seconds"].get("export", 0.0)
    return {"seconds": seconds, "peak_memory_bytes": max(report["peak_memory_bytes"].values())}


def measure(case: Case, texts: dict[str, Path]) -> dict[str, Any]:
    """One row, from its file if it is there."""
    if not case.file.exists():
        with tempfile.TemporaryDirectory(dir=case.work) as folder:
            facts = pruned(case, Path(folder))
            after = perplexity(Path(folder) / "model", texts)
            size = open_checkpoint(Path(folder) / "model").decoder_parameters
        result = {"name": case.name, "sparsity": case.sparsity, "decoder_parameters": size, "perplexity": after} | facts
        case.file.write_text(json.dumps(result))
        print(json.dumps(result), flush=True)
    found: dict[str, Any] = json.loads(case.file.read_text())
    return found


def line(result: dict[str, Any], dense: dict[str, float], decoder_parameters: int) -> list[str]:
    """One result as a row of the table."""
    ratios = [f"{result['perplexity'][name] / dense[name]:.4f}" for name in dense]
    first = next(iter(dense))
    removed = 1 - result["decoder_parameters"] / decoder_parameters
    memory = f"{result['peak_memory_bytes'] / 2**30:.2f}"
    return [result["name"], f"{removed:.2%}", f"{result['perplexity'][first]:.2f}", *ratios, f"{result['seconds']:.0f}", memory]


def plot(results: Sequence[dict[str, Any]], dense: float, text: str, file: Path) -> None:
    """Decoder parameters against perplexity on the first text, one line for each row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "quality"
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name in dict.fromkeys(result["name"] for result in results):
        points = sorted((r["decoder_parameters"] / 1e6, r["perplexity"][text] / dense) for r in results if r["name"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="decoder parameters, millions", ylabel="perplexity, ratio to dense", yscale="log")
    axes.set_ylim(1.1, 6)  # what is worse than that is only in the table
    axes.set_yticks([1.2, 1.4, 1.7, 2, 3, 5], ["1.2", "1.4", "1.7", "2", "3", "5"])
    axes.minorticks_off()
    axes.legend(fontsize=6)
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")


def second_domain(folder: Path) -> Path:
    """English text that every CPython brings."""
    from pydoc_data.topics import topics

    file = folder / "topics.txt"
    file.write_text("\n\n".join(topics[key] for key in sorted(topics)), encoding="utf-8")
    return file


def main() -> None:
    """Run what is missing, print and record everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to run")
    parser.add_argument("--jobs", type=int, default=2, help="rows that run at the same time, each on one thread")
    parser.add_argument("--no-run", action="store_true", help="record the rows that are in FOLDER, run none")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where results and models lie")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    content = options.text.read_text(encoding="utf-8")
    first = work / "calibration.txt"
    first.write_text(content[: int(len(content) * (1 - HELD_OUT_FRACTION))], encoding="utf-8")
    texts = {"same domain": held_out(options.text, work), "help topics": second_domain(work)}
    wanted = [(name, sparsity) for sparsity in options.sparsity for name in (*METHODS, *OTHERS)]
    wanted += [(name, options.sparsity[0]) for name in ABLATIONS]
    picked = [(name, sparsity) for name, sparsity in wanted if any(fnmatch.fnmatch(name, pattern) for pattern in options.rows)]
    cases = [Case(name, sparsity, first, work) for name, sparsity in picked]
    if options.no_run:
        cases = [case for case in cases if case.file.exists()]
    known = work / "dense.json"
    if not known.exists():
        known.write_text(json.dumps(perplexity(MODEL, texts)))
    dense = json.loads(known.read_text())
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda case: measure(case, texts), cases))
    parameters = open_checkpoint(MODEL).decoder_parameters
    columns = ["", "decoder removed", "perplexity", *(f"ratio, {name}" for name in dense), "seconds", "GiB"]
    tables = [
        f"## {sparsity:.0%} of the decoder\n\n" + table(columns, [line(r, dense, parameters) for r in results if r["sparsity"] == sparsity])
        for sparsity in options.sparsity
    ]
    notes = ", ".join(f"{name} {value:.3f}" for name, value in dense.items())
    file = record("quality", "\n\n".join([f"Dense perplexity: {notes}. One thread each, {options.jobs} rows at a time.", *tables]))
    plot(results, dense["same domain"], "same domain", RESULTS / f"{file.stem}.svg")


if __name__ == "__main__":
    assert set(OTHERS.values()) == set(BASELINES)
    main()
