"""Every method and selector, and what others do, on the demo model with the same text and token
counts: quality, size, time, memory.

    python -m benchmarks.quality TEXT [--sparsity 0.2 0.3 0.4] [--rows 'stat*' ...] [--jobs 2]
    [--device cuda] [--windows 52] [--work FOLDER] [--no-run]

Calibrates on the first windows of TEXT (64 x 512 tokens unless a row says otherwise) and evaluates
on its last fifth, on CPython's help topics and on Python source, in 1024-token windows: ratio of
perplexities, KL divergence from the dense model, agreement on the likeliest token. Rows that are
in FOLDER already are not run again. Needs `pip install -e '.[bench]'`.
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import BASELINES, MODEL
from benchmarks.demo_model import HERE, first_part, run
from benchmarks.quality_rows import ALL, GIVEN, GIVEN_WINDOWS, OTHERS, OWN, OWN_WINDOWS, ROWS
from benchmarks.results import RESULTS, record, table
from benchmarks.yardstick import MOST_WINDOWS, cells, columns, measured, texts_of
from rayprune.specs.calibration import CalibrationSpec
from rayprune.workers.calibration import calibration_windows, load_tokenizer
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.layout import model_folder, recovered_folder

RECOVERED = ", recovered"
"""What the names of rows end with whose model was trained after the cut."""


@dataclass(frozen=True)
class Case:
    """One row at one sparsity."""

    name: str
    sparsity: float
    text: Path
    work: Path
    device: str
    windows: int
    """Of each text that it is evaluated on, at most."""

    @property
    def file(self) -> Path:
        return self.work / f"{self.name.replace(' ', '-').replace(',', '')}-{self.sparsity}.json"

    @property
    def unrecovered(self) -> "Case":
        """The row of the model as it was cut."""
        return replace(self, name=self.name.removesuffix(RECOVERED))


def baseline(case: Case, folder: Path) -> dict[str, Any]:
    """Prune as another tool does, in a process of its own: seconds and peak memory."""
    words = [
        OTHERS[case.name],
        str(case.text),
        "--sparsity",
        str(case.sparsity),
        "--out",
        str(folder / "model"),
    ]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.baselines", *words], check=True, cwd=HERE.parent
    )
    facts: dict[str, Any] = json.loads((folder / "model" / "baseline.json").read_text())
    return facts


def pruned(case: Case, folder: Path) -> dict[str, Any]:
    """Prune as a row says, in a process of its own: seconds but for the export, and for recovery,
    and peak memory.
    """
    settings = [
        f"calibration.path={case.text}",
        "evaluation=null",
        f"budget.sparsity={case.sparsity}",
        "cluster.executor=in-process",
    ]
    own = [
        setting.replace(OWN, str(case.work / "own.jsonl")).replace(GIVEN, str(case.text))
        for setting in ROWS[case.name].settings
    ]
    report = run([*settings, "parallel.workers=1", f"parallel.device={case.device}", *own], folder)
    taken, peaks = report["seconds"], report["peak_memory_bytes"]
    memory = max(
        peak for name, peak in peaks.items() if case.device == "cpu" or name.endswith(" GPU")
    )
    return {
        "seconds": taken["total"] - taken.get("export", 0.0),
        "peak_memory_bytes": memory,
        "recover": taken.get("recover", 0.0),
    }


def measure(case: Case, texts: dict[str, Path]) -> None:
    """Write one row's file; a row that recovers writes that of the model as it was cut, too. A row
    that fails leaves the others alone.
    """
    try:
        with tempfile.TemporaryDirectory(dir=case.work) as name:
            folder = Path(name)
            facts = (baseline if case.name in OTHERS else pruned)(case, folder)
            recovery = facts.pop("recover", 0.0)
            if recovery:
                _note(case, recovered_folder(folder), texts, facts)
            if not case.unrecovered.file.exists():
                _note(
                    case.unrecovered,
                    model_folder(folder),
                    texts,
                    facts | {"seconds": facts["seconds"] - recovery},
                )
    except subprocess.CalledProcessError as error:
        print(f"{case.name} at {case.sparsity}: {error}", file=sys.stderr, flush=True)


def _note(case: Case, model: Path, texts: dict[str, Path], facts: dict[str, Any]) -> None:
    size, found = (
        open_checkpoint(model).decoder_parameters,
        measured(model, MODEL, texts, case.device, case.windows),
    )
    result = (
        {"name": case.name, "sparsity": case.sparsity, "decoder_parameters": size} | found | facts
    )
    case.file.write_text(json.dumps(result))
    print(json.dumps(result), flush=True)


def line(result: dict[str, Any], dense: dict[str, float], decoder_parameters: int) -> list[str]:
    """One result as a row of the table."""
    first = next(iter(dense))
    removed = 1 - result["decoder_parameters"] / decoder_parameters
    memory = f"{result['peak_memory_bytes'] / 2**30:.2f}"
    return [
        result["name"],
        f"{removed:.2%}",
        f"{result['perplexity'][first]:.2f}",
        *cells(result, dense),
        f"{result['seconds']:.0f}",
        memory,
    ]


def plot(results: Sequence[dict[str, Any]], dense: float, text: str, file: Path) -> None:
    """Decoder parameters against perplexity on the first text, one line for each row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "quality"
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name in dict.fromkeys(result["name"] for result in results):
        points = sorted(
            (r["decoder_parameters"] / 1e6, r["perplexity"][text] / dense)
            for r in results
            if r["name"] == name
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(
        xlabel="decoder parameters, millions", ylabel="perplexity, ratio to dense", yscale="log"
    )
    axes.set_ylim(1.1, 6)  # what is worse than that is only in the table
    axes.set_yticks([1.2, 1.4, 1.7, 2, 3, 5], ["1.2", "1.4", "1.7", "2", "3", "5"])
    axes.minorticks_off()
    axes.legend(fontsize=6)
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")


def own_text(text: Path, file: Path) -> None:
    """Let the model write what the rows need of its own text, and a little more: tokenised again,
    text gives another number of tokens.

    It goes on from the windows that stand beside it in the rows' calibration, so that no other text
    is drawn on.
    """
    tokenizer, prompts = load_tokenizer(MODEL), file.with_name("prompts.txt")
    given = calibration_windows(
        CalibrationSpec(path=str(text), samples=GIVEN_WINDOWS, sequence_length=512), tokenizer
    )
    prompts.write_text(tokenizer.decode(given.flatten()), encoding="utf-8")
    words = [
        "generate",
        str(MODEL),
        "--prompts",
        str(prompts),
        "--tokens",
        str(OWN_WINDOWS * 512 * 11 // 10),
        "--batch",
        "64",
    ]
    with file.with_suffix(".part").open("w") as out:
        subprocess.run(
            [sys.executable, "-m", "rayprune.orchestrator.cli", *words],
            check=True,
            cwd=HERE.parent,
            stdout=out,
        )
    file.with_suffix(".part").replace(file)


def main() -> None:
    """Run what is missing, print and record everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--sparsity", type=float, nargs="+", default=ALL)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to run")
    parser.add_argument(
        "--jobs", type=int, default=2, help="rows that run at the same time, each on one thread"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where models are pruned and evaluated; others' tools: CPU",
    )
    parser.add_argument(
        "--windows", type=int, default=MOST_WINDOWS, help="evaluation windows of each text"
    )
    parser.add_argument(
        "--no-run", action="store_true", help="record the rows that are in FOLDER, run none"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality"), help="where results and models lie"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    first = first_part(options.text, work)
    texts = texts_of(options.text, work)
    rows = {name: row.sparsities for name, row in ROWS.items()} | dict.fromkeys(OTHERS, ALL)
    names = [
        name for name in rows if any(fnmatch.fnmatch(name, pattern) for pattern in options.rows)
    ]
    cases = [
        Case(name, sparsity, first, work, options.device, options.windows)
        for sparsity in options.sparsity
        for name in names
        if sparsity in rows[name]
    ]
    known = work / "dense.json"
    if not known.exists():
        found = measured(MODEL, MODEL, texts, options.device, options.windows)
        known.write_text(json.dumps(found["perplexity"]))
    dense = json.loads(known.read_text())
    if not options.no_run:
        by_others = {case.unrecovered for case in cases if case.unrecovered != case}
        missing = [case for case in cases if case not in by_others and not case.file.exists()]
        own = work / "own.jsonl"
        if not own.exists() and any(
            OWN in setting
            for case in missing
            if case.name in ROWS
            for setting in ROWS[case.name].settings
        ):
            own_text(first, own)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda case: measure(case, texts), missing))
    results = [json.loads(case.file.read_text()) for case in cases if case.file.exists()]
    parameters = open_checkpoint(MODEL).decoder_parameters
    heads = ["", "decoder removed", "perplexity", *columns(list(dense)), "seconds", "GiB"]
    tables = [
        f"## {sparsity:.0%} of the decoder\n\n"
        + table(heads, [line(r, dense, parameters) for r in results if r["sparsity"] == sparsity])
        for sparsity in dict.fromkeys(result["sparsity"] for result in results)
    ]
    notes = ", ".join(f"{name} {value:.3f}" for name, value in dense.items())
    head = (
        f"Dense perplexity of at most {options.windows} windows of 1024 tokens: {notes}. One thread"
        f" each, {options.jobs} rows at a time."
    )
    file = record("quality", "\n\n".join([head, *tables]), options.device)
    plot(results, dense["same domain"], "same domain", RESULTS / f"{file.stem}.svg")
    if not options.no_run and len(results) < len(cases):
        sys.exit(
            f"error: {len(cases) - len(results)} of {len(cases)} rows failed, see above; the others"
            " are recorded"
        )


if __name__ == "__main__":
    assert set(OTHERS.values()) == set(BASELINES)
    main()
