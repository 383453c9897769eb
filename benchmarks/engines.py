"""What engines do with pruned models: every form that a job can write, in every engine that is
installed here.

    python -m benchmarks.engines MODEL TEXT [--transformers-4 FOLDER]
    python -m benchmarks.engines MODEL TEXT --speed RUN

Prunes MODEL by 20% with the first 16 x 256 tokens of TEXT in three ways (layers alike, of different
sizes, and these padded), writes every form, and lets every engine go on with 8 texts: its tokens
must be those of transformers in float32. FOLDER holds transformers 4 (pip install --target FOLDER
--no-deps "transformers<5" "tokenizers<0.23" "huggingface-hub<1"). Writes
benchmarks/results/engines_cpu_DATE.md; with `--speed` engine-speed_cpu_DATE.md: llama.cpp on one
thread with a run's files and with those of MODEL, in turns, in Q4_K_M too where cyllama is
installed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import record, table
from rayprune.orchestrator.reporting.report import read_report
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import RaypruneError, ResourceError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.engines.agreement import COUNT, Agreement, compare, compare_run, prompts_of
from rayprune.workers.engines.engine import ENGINES, Engine
from rayprune.workers.formats.gguf_file import write_gguf
from rayprune.workers.store.layout import CALIBRATION_TASK, TOKENS_FILE, model_folder, task_folder

UNEVEN: dict[str, Any] = {"per_layer": True, "allocation": "threshold"}
SHAPES: dict[str, dict[str, Any]] = {
    "layers alike": {
        "export": {"target": ["transformers-4", "ctranslate2", "vllm", "gguf", "gguf-q8_0"]}
    },
    "layers of different sizes": {
        "method": "numerical",
        "budget": UNEVEN | {"kv_groups": "ALL"},
        "export": {"target": ["vllm", "gguf", "gguf-q8_0"]},
    },
    "layers of different sizes, KV groups too": {
        "method": "numerical",
        "budget": UNEVEN,
        "export": {"target": ["gguf"]},
    },
    "the same, padded": {
        "method": "numerical",
        "budget": UNEVEN,
        "export": {"target": ["transformers-4", "vllm", "gguf"], "pad": True},
    },
}
"""What differs from the usual job, by shape."""
OLDER = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
found = []
for prompt in json.load(sys.stdin):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(sys.argv[2]), do_sample=False)
    found.append(out[0, len(prompt):].tolist())
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
words = "Words, and 123 numbers.  So it is."
print(json.dumps([transformers.__version__, found, tokenizer(words)["input_ids"]]))
"""  # noqa: E501
PREFILL, DECODE, ROUNDS = 512, 64, 5


def job_of(model: Path, text: Path, shape: dict[str, Any], groups: int) -> JobSpec:
    """The job of a shape."""
    sections = json.loads(json.dumps(shape).replace('"ALL"', str(groups)))
    return load_job(
        {
            "model": {"path": str(model)},
            "calibration": {"path": str(text), "samples": 16, "sequence_length": 256},
            "cluster": {"executor": "in-process"},
            **sections,
        }
    )


def seen(name: str, run: Path) -> Iterator[tuple[str, str]]:
    """What an engine does with every form of a run that it reads."""
    try:
        targets = read_report(run).models.exports
        for found in compare_run(name, run, model_folder(run), targets):
            yield found.target, said(found)
    except ResourceError:
        yield name, "not installed here"
    except RaypruneError as error:
        yield name, f"**{error}**"


def said(found: Agreement) -> str:
    """An agreement in a cell."""
    ties = f", {len(found.ties)} part at a tie ({max(found.ties):.2g} nats)" if found.ties else ""
    return f"{found.compared} tokens equal{ties}"


def older(packages: Path, run: Path) -> tuple[str, str]:
    """What transformers 4 does with a run's folder."""
    prompts = prompts_of(task_folder(run, CALIBRATION_TASK) / TOKENS_FILE)
    model, told = model_folder(run), list[Any]()

    def greedy(folder: Path, texts: Sequence[list[int]], count: int) -> list[list[int]]:
        done = subprocess.run(
            [sys.executable, "-c", OLDER, str(folder), str(count)],
            input=json.dumps(texts),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(packages)},
            check=False,
        )
        if done.returncode:
            words = re.sub("\x1b\\[[0-9;]*m", "", done.stderr).strip()  # without colours
            raise ResourceError(words.splitlines()[-1][:200])
        told.extend(json.loads(done.stdout.splitlines()[-1]))
        return list(told[1])

    class Older(Engine):
        def greedy(self) -> Any:
            return greedy

    try:
        words = said(
            compare(Older("transformers", "", ("transformers",)), "", model, model, prompts)
        )
    except ResourceError as error:
        return "transformers 4", f"refused: {error}"
    except RaypruneError as error:
        return f"transformers {told[0]}", f"**{error}**"
    from transformers import AutoTokenizer

    text = "Words, and 123 numbers.  So it is."
    same = AutoTokenizer.from_pretrained(model)(text)["input_ids"] == told[2]
    return f"transformers {told[0]}", words + ("" if same else ", **another tokenizer**")


def quantised(file: Path, folder: Path) -> Path:
    """A file in F16 as Q4_K_M in a folder, by the llama.cpp that cyllama brings.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        from cyllama.llama import llama_cpp
    except ImportError:
        raise ResourceError("Q4_K_M is left out: pip install cyllama") from None
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model-Q4_K_M.gguf"
    llama_cpp.model_quantize(str(file), str(target), params)
    return target


def speed(file: Path) -> tuple[float, float]:
    """Tokens per second of reading 512 tokens, and of writing 64 behind them, on one thread."""
    from rayprune.workers.engines.llama_cpp import ask, server

    running = server(file, PREFILL + DECODE + 8)
    prompt = list(range(100, 100 + PREFILL))
    times = ask(running, {"prompt": prompt, "n_predict": DECODE, "ignore_eos": True})["timings"]
    return float(times["prompt_per_second"]), float(times["predicted_per_second"])


def speeds(files: dict[str, tuple[Path, ...]]) -> str:
    """Of dense and pruned files by type, measured in turns: medians, and of the ratios."""
    rows = []
    for name, pair in files.items():
        rounds = [[speed(file) for file in pair] for _ in range(ROUNDS)]
        for place, what in enumerate(("read", "write")):
            dense, pruned = ([r[which][place] for r in rounds] for which in (0, 1))
            ratio = statistics.median(p / d for d, p in zip(dense, pruned, strict=True))
            numbers = [f"{statistics.median(values):.0f}" for values in (dense, pruned)]
            sizes = [f"{file.stat().st_size / 2**20:.0f}" for file in pair]
            rows.append([f"{name}, {what}", *numbers, f"{ratio:.2f}", *sizes])
    columns = ["tokens per second", "dense", "pruned", "pruned / dense", "MiB dense", "MiB pruned"]
    return table(columns, rows)


def tried(options: argparse.Namespace) -> str:
    """Prune in every way, write every form, try every engine: a table."""
    groups = json.loads((options.model / "config.json").read_text())["num_key_value_heads"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, shape) in enumerate(SHAPES.items()):
            run = Path(folder) / str(number)
            run_job(job_of(options.model, options.text, shape, groups), run, lambda event: None)
            if options.transformers_4:
                rows.append([name, *older(options.transformers_4.absolute(), run)])
            for engine in ENGINES.values():
                for target, words in seen(engine.name, run):
                    rows.append([name, f"{engine.name}: {target}", words.replace(folder, "")])
    return table(["shape", "engine: form", f"8 texts, {COUNT} tokens each"], rows)


def compared(options: argparse.Namespace) -> str:
    """Speeds of a run's files and of the dense model's."""
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, tuple[Path, ...]] = {}
        for target in ("gguf", "gguf-q8_0"):
            dense = Path(folder) / target
            (file,) = write_gguf(options.model, dense, target)
            files[file.removesuffix(".gguf")] = (
                dense / file,
                options.speed / "export" / target / file,
            )
        try:
            name, places = "model-Q4_K_M", (Path(folder) / "dense", Path(folder) / "pruned")
            files[name] = tuple(map(quantised, files["model-F16"], places))
        except ResourceError as error:
            print(error, flush=True)
        return speeds(files)


def versions() -> str:
    """Of all engines."""
    found = []
    for engine in ENGINES.values():
        try:
            found.append(f"{engine.name}: {engine.version}")
        except ResourceError:
            found.append(f"{engine.name}: not installed")
    return "; ".join(found)


def main() -> None:
    """Try, or measure, and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a Llama, Mistral or Qwen")
    parser.add_argument("text", type=Path, help="calibration text")
    parser.add_argument("--transformers-4", type=Path, metavar="FOLDER")
    parser.add_argument("--speed", type=Path, metavar="RUN")
    options = parser.parse_args()
    name, content = (
        ("engine-speed", compared(options)) if options.speed else ("engines", tried(options))
    )
    record(name, f"{versions()}.\n\n{content}")


if __name__ == "__main__":
    main()
