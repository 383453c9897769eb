"""Zeros in the demo model's matrices: patterns and scores, on the same text and token counts.

    python -m benchmarks.sparsity TEXT [--rows '2:4*' ...] [--samples 64] [--windows 52]
    [--work FOLDER]

Calibrates on the first windows of TEXT (64 x 512 tokens) and evaluates on its last fifth and on a
second domain, as `benchmarks.quality` does. Rows that are in FOLDER already are not run again, and
a run that was stopped goes on; the result has all rows that are there.
"""

import argparse
import fnmatch
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import MODEL
from benchmarks.demo_model import first_part, held_out, run
from benchmarks.results import record, table
from benchmarks.yardstick import cells, columns, help_topics, measured
from rayprune.specs.methods.options import SITES
from rayprune.workers.store.layout import model_folder

ROWS = {
    f"{pattern}, {score}": {"pattern": pattern, "score": score}
    for pattern in ("2:4", "4:8", "unstructured")
    for score in ("magnitude", "wanda", "obs")
} | {
    f"2:4, obs, {' and '.join(sites)}": {"pattern": "2:4", "sites": sites}
    for sites in (["qkv", "o"], ["up", "down"])
}
"""The options of the method, by the row's name; half of the weights are zero in all of them."""


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    text: Path
    """That of the calibration."""
    samples: int
    """Its windows."""
    texts: dict[str, Path]
    """Those of the evaluation, by domain."""
    windows: int
    """Of each of them."""
    work: Path

    def file(self, name: str) -> Path:
        """Where a row's result lies."""
        return self.work / f"{name.replace(' ', '-').replace(',', '').replace(':', '-')}.json"

    def measured(self, model: Path) -> dict[str, dict[str, float]]:
        """By measure and domain."""
        return measured(model, MODEL, self.texts, "cpu", self.windows)


def measure(name: str, setting: Setting) -> None:
    """Write one row's file: what the yardstick says, the sites' mean errors, seconds, memory."""
    folder = setting.file(name).with_suffix("")
    settings = [
        f"method={json.dumps({'name': 'sparse'} | ROWS[name])}",
        f"calibration.path={setting.text}",
        f"calibration.samples={setting.samples}",
        "evaluation=null",
        "parallel.workers=1",
        "cluster.executor=in-process",
    ]
    report = run(settings, folder)
    result = {
        **setting.measured(model_folder(folder)),
        "errors": {site: _mean_errors(report, site) for site in SITES},
        "seconds": report["seconds"]["total"] - report["seconds"]["export"],
        "bytes": max(report["peak_memory_bytes"].values()),
    }
    setting.file(name).write_text(json.dumps(result))
    shutil.rmtree(folder)


def _mean_errors(report: dict[str, Any], site: str) -> list[float] | None:
    """Held-out error of the mask alone and of what was made, and in how many layers the latter is
    less; None where the site has no zeros.
    """
    found = [layer["groups"][site] for layer in report["layers"] if site in layer["groups"]]
    if not found:
        return None
    alone, made = ([each[key] for each in found] for key in ("mask_error", "held_out_error"))
    less = sum(one < other for one, other in zip(made, alone, strict=True))
    return [sum(alone) / len(found), sum(made) / len(found), less]


def page(setting: Setting, dense: Mapping[str, float]) -> str:
    """The rows that are there, as Markdown."""
    results = {
        name: json.loads(setting.file(name).read_text())
        for name in ROWS
        if setting.file(name).exists()
    }
    first = [
        [
            name,
            *cells(result, dict(dense)),
            f"{result['seconds']:.0f}",
            f"{result['bytes'] / 2**30:.2f}",
        ]
        for name, result in results.items()
    ]
    second = [[name, *map(_shown, r["errors"].values())] for name, r in results.items()]
    notes = ", ".join(f"{domain} {value:.3f}" for domain, value in dense.items())
    return "\n\n".join(
        [
            f"Calibrated on {setting.samples} x 512 tokens, one thread. Dense perplexity of"
            f" {setting.windows} windows of 1024 tokens: {notes}.",
            table(["", *columns(list(dense)), "seconds", "GiB"], first),
            "Held-out error of a site, mean over the layers: of the mask alone, then with the"
            " correction, and in how many layers that is less.",
            table(["", *SITES], second),
        ]
    )


def _shown(errors: list[float] | None) -> str:
    if errors is None:
        return ""
    alone, made, less = errors
    return f"{alone:.3f}, {made:.3f} ({less:.0f})" if less else f"{alone:.3f}"


def main() -> None:
    """Run what is missing, print and record everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to run")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=52, help="evaluation windows of each text")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sparsity"), help="where results lie"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    first = first_part(options.text, work)
    texts = {"same domain": held_out(options.text, work), "help topics": help_topics(work)}
    setting = Setting(first, options.samples, texts, options.windows, work)
    known = work / "dense.json"
    if not known.exists():
        known.write_text(json.dumps(setting.measured(MODEL)["perplexity"]))
    dense = json.loads(known.read_text())
    for name in ROWS:
        chosen = any(fnmatch.fnmatch(name, pattern) for pattern in options.rows)
        if chosen and not setting.file(name).exists():
            measure(name, setting)
    record("sparsity", page(setting, dense))


if __name__ == "__main__":
    main()
