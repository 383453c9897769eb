"""`rayprune generate` beside a plain `model.generate` of the same batch: tokens per second.

    python -m benchmarks.own_text MODEL [--documents 64] [--length 256] [--dtypes float32 bfloat16]

Both sample documents of the model's own from its first token, all in one batch, in every type:
`generate` in one process and by two Ray workers, which share the documents. The seconds are those
of the text's stage, and of the one call of `model.generate`. All have the machine to themselves,
one after the other. Writes benchmarks/results/own-text_cpu_DATE.md.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import record, table
from rayprune.orchestrator.execution.run_folder import read_events, seconds_per_stage
from rayprune.orchestrator.stages.own_text import STAGE


def plain(model: Path, documents: int, length: int, dtype: str) -> tuple[int, float]:
    """Tokens and seconds of `model.generate`, sampled alike; in a process of its own."""
    code = "from benchmarks.own_text import call; call()"
    words = [str(model), str(documents), str(length), dtype]
    told = subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, text=True
    )
    tokens, seconds = json.loads(told.stdout.splitlines()[-1])
    return tokens, seconds


def call() -> None:
    """Call `model.generate` with what the command line says, and print tokens and seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, documents, length, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    first = AutoTokenizer.from_pretrained(folder).bos_token_id
    torch.manual_seed(0)
    start = time.perf_counter()
    tokens_BL = model.generate(
        torch.full((int(documents), 1), first),
        attention_mask=torch.ones(int(documents), 1, dtype=torch.long),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=int(length) - 1,
        max_new_tokens=int(length) - 1,
    )
    print(json.dumps([tokens_BL.numel(), time.perf_counter() - start]))


def own(
    model: Path, documents: int, length: int, dtype: str, workers: int
) -> tuple[int, float, str]:
    """Tokens and seconds of `rayprune generate`, and its text's digest."""
    batch = -(-documents // workers)
    with tempfile.TemporaryDirectory() as folder:
        words = {
            "tokens": documents * length,
            "length": length,
            "batch": batch,
            "dtype": dtype,
            "workers": workers,
            "out": folder,
        }
        told = subprocess.run(
            [sys.executable, "-m", "rayprune.orchestrator.cli", "generate", str(model)]
            + [word for name, value in words.items() for word in (f"--{name}", str(value))],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | ({} if workers == 1 else {"OMP_NUM_THREADS": "1"}),
        )
        seconds = seconds_per_stage(read_events(Path(folder)))[STAGE]
    tokens = sum(len(json.loads(line)["input_ids"]) for line in told.stdout.splitlines())
    return tokens, seconds, hashlib.sha256(told.stdout.encode()).hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way in every type and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], metavar="TYPE")
    options = parser.parse_args(arguments)
    asked = (options.model.resolve(), options.documents, options.length)
    rows = []
    for dtype in options.dtypes:
        tokens, seconds = plain(*asked, dtype)
        base = tokens / seconds
        rows.append([f"`model.generate`, {dtype}", tokens, f"{seconds:.1f}", f"{base:.0f}", 1, ""])
        for workers in (1, 2):
            tokens, seconds, digest = own(*asked, dtype, workers)
            speed = tokens / seconds
            where = "in process" if workers == 1 else f"{workers} Ray workers"
            numbers = [tokens, f"{seconds:.1f}", f"{speed:.0f}", f"{speed / base:.2f}", digest]
            rows.append([f"`rayprune generate`, {dtype}, {where}", *numbers])
    columns = ["", "tokens", "seconds", "tokens/s", "of `model.generate`", "text"]
    record("own-text", table(columns, rows))


if __name__ == "__main__":
    main()
