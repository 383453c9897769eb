"""Where activations come from, and how much of the drift is made up for, at several sparsities on
the demo model: quality and time.

    python -m benchmarks.propagation TEXT [--sparsity 0.2 0.3 0.4] [--set a.b=c ...]

Calibrates on the first windows of TEXT and evaluates on its last fifth, as `benchmarks.demo_model`
does.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_model import MODEL, held_out, run
from benchmarks.results import record, table
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.workers.calibration import evaluation_windows, load_tokenizer
from rayprune.workers.passes.evaluate import window_losses

VARIANTS = {
    "dense": ["parallel.placement=layers"],
    "refit": ["parallel.placement=layers", "parallel.propagation=refit"],
    "pruned": [],
    "pruned, drift 0.5": ["correction.drift=0.5"],
}


def perplexity(model: Path, text: Path) -> float:
    """Perplexity on the held-out text, 1024-token windows."""
    windows_NT = evaluation_windows(EvaluationSpec(path=str(text)), load_tokenizer(model))
    losses = window_losses(
        model,
        windows_NT,
        0,
        windows_NT.shape[1],
        torch.float32,
        torch.device("cpu"),
        lambda tensor: tensor,
    )
    return math.exp(math.fsum(loss for loss, _ in losses) / sum(count for _, count in losses))


def row(
    text: Path, evaluated: Path, dense: float, sparsity: float, variant: str, overrides: list[str]
) -> list[Any]:
    """One run: what was asked, perplexity, seconds."""
    settings = [f"calibration.path={text}", "evaluation=null", f"budget.sparsity={sparsity}"]
    settings += [*VARIANTS[variant], *overrides]
    with tempfile.TemporaryDirectory() as folder:
        report = run(settings, Path(folder))
        after = perplexity(Path(folder) / "model", evaluated)
    seconds = sum(report["seconds"].get(stage, 0.0) for stage in ("select", "sweep"))
    removed = 1 - report["decoder_parameters"]["after"] / report["decoder_parameters"]["before"]
    shape = f"{report['shape']['heads']} KV groups, {report['shape']['neurons']} neurons"
    print(sparsity, variant, after / dense, seconds, flush=True)
    return [
        f"{sparsity:.0%}",
        variant,
        shape,
        f"{removed:.2%}",
        f"{after:.3f}",
        f"{after / dense:.4f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    """Run all, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    text = options.text.absolute()
    with tempfile.TemporaryDirectory() as folder:
        evaluated = held_out(text, Path(folder))
        dense = perplexity(MODEL, evaluated)
        rows = [
            row(text, evaluated, dense, s, v, options.overrides)
            for s in options.sparsity
            for v in VARIANTS
        ]
    heads = [
        "sparsity",
        "variant",
        "shape",
        "decoder removed",
        "perplexity",
        "ratio to dense",
        "seconds of sweep",
    ]
    record(
        "propagation",
        f"{table(heads, rows)}\n\nDense perplexity {dense:.3f}, last fifth of the text, windows of"
        " 1024 tokens.",
    )


if __name__ == "__main__":
    main()
