"""Whether two checkouts write the same pruned models, byte for byte: tiny models of every family,
every kind of job, and the demo.

python -m benchmarks.same_bytes /path/to/other/checkout
python -m benchmarks.same_bytes /path/to/other/checkout --demo

Both checkouts run with this environment's packages, in-process, on models and texts that this one
makes. Compared is every file of every `model` folder but `manifest.json`, which names the code's
version and the job's form, and `README.md`, its card.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_model import SIZES, byte_tokenizer
from benchmarks.results import table

HERE = Path(__file__).parents[1]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3")
TRAINING = {"epochs": 1, "batch": 4, "learning_rate": 1e-3, "checkpoint_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "fewer heads": {"budget": {"kv_groups": 1}},
    "bf16": {"export": {"dtype": "bfloat16"}, "model": {"dtype": "bfloat16"}},
    "rows": {"method": {"name": "stat", "factorization": "qr"}},
    "gradients": {"method": {"name": "stat", "scale": "gradients"}},
    "drift": {"correction": {"drift": 0.5}},
    "dense path": {"parallel": {"placement": "layers"}},
    "refit": {"parallel": {"placement": "layers", "propagation": "refit"}},
    "per layer": {"budget": {"per_layer": True}},
    "padded": {"budget": {"per_layer": True}, "export": {"pad": True}},
    "search": {
        "budget": {
            "per_layer": True,
            "allocation": {"name": "search", "generations": 2, "offspring": 2},
        }
    },
    "threshold": {"method": "numerical", "budget": {"per_layer": True, "allocation": "threshold"}},
    "numerical": {"method": "numerical"},
    "obs": {"method": {"name": "obs", "swaps": 2}},
    "flap": {"method": "flap"},
    "wanda": {"method": "wanda"},
    "dress": {"method": {"name": "dress", "training": TRAINING}},
    "dress by layer": {
        "method": {"name": "dress", "mask": "stat", "scope": "layer", "training": TRAINING}
    },
    "trsp": {"method": {"name": "trsp", "gates": TRAINING, "training": TRAINING}},
    "recovery": {"recover": TRAINING},
    "distillation": {"recover": {**TRAINING, "loss": "distillation", "lora": {"rank": 2}}},
}
CASES = {family: (family, dict[str, Any]()) for family in FAMILIES}
CASES |= {f"llama, {kind}": ("llama", sections) for kind, sections in KINDS.items()}
CASES |= {
    "qwen2, fewer heads, vllm": (
        "qwen2",
        {"budget": {"kv_groups": 1}, "export": {"target": "vllm"}},
    )
}
CASES |= {"gemma2, per layer": ("gemma2", {"budget": {"per_layer": True}})}
DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    from rayprune.orchestrator.cli import main
except ImportError:
    from orchestrator.cli import main
for job in sys.argv[2:]:
    code = main(["run", job, "--out", job.removesuffix(".yaml") + ".run"])
    if code:
        print("FAILED", job, code)
"""


def write_model(folder: Path, model_type: str) -> Path:
    """A tiny random model; random norm weights make its activations unlike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SIZES), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5
                if "norm" in name
                else torch.randn_like(parameter) * 0.15
            )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_inputs(folder: Path) -> Path:
    """The models of all cases and the calibration text."""
    from pydoc_data.topics import topics

    for model_type in FAMILIES:
        write_model(folder / model_type, model_type)
    (folder / "text.txt").write_text(
        "\n\n".join(topics[key] for key in sorted(topics))[:60_000], encoding="utf-8"
    )
    return folder


def write_job(inputs: Path, file: Path, model_type: str, sections: dict[str, Any]) -> None:
    """A case's job."""
    job: dict[str, Any] = {
        "model": {"path": str(inputs / model_type)},
        "calibration": {
            "path": str(inputs / "text.txt"),
            "samples": 16,
            "sequence_length": 64,
            "shards": 4,
        },
        "budget": {"sparsity": 0.25, "round_to": 4},
        "parallel": {"micro_batch": 2, "device": "cpu"},
        "cluster": {"executor": "in-process"},
    }
    for name, section in sections.items():
        job[name] = (
            {**job[name], **section} if isinstance(section, dict) and name in job else section
        )
    file.write_text(yaml.safe_dump(job))


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file of every model folder of a run, by its name in the run."""
    files = [
        file
        for file in sorted(run.rglob("*"))
        if file.is_file() and "model" in file.relative_to(run).parts
    ]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in ("manifest.json", "README.md")
    }


def run_cases(checkout: Path, inputs: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Every case's digests, as a checkout's code makes them."""
    folder.mkdir()
    jobs = {name: folder / f"{number:02d}.yaml" for number, name in enumerate(CASES)}
    for name, (model_type, sections) in CASES.items():
        write_job(inputs, jobs[name], model_type, sections)
    run_jobs(checkout, folder, list(jobs.values()))
    return {name: digests(job.with_suffix(".run")) for name, job in jobs.items()}


def run_jobs(checkout: Path, folder: Path, jobs: list[Path]) -> None:
    """Run jobs with a checkout's code, all in one process; what fails is printed."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(checkout),
    }
    words = [sys.executable, "-P", "-c", DRIVER, str(checkout), *map(str, jobs)]
    done = subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines() + done.stderr.splitlines():
        if "FAILED" in line or line.startswith("rayprune:"):
            print(f"{checkout}: {line}")


def run_demo(checkout: Path, folder: Path) -> dict[str, str]:
    """The demo's digests, as a checkout's code makes them; its model and texts are this
    checkout's.
    """
    words = [
        "run",
        str(HERE / "examples/smollm2/job.yaml"),
        "--out",
        str(folder),
        "--set",
        "cluster.executor=in-process",
    ]
    code = (
        f"import sys; sys.path.insert(0, {str(checkout)!r})\n"
        + DRIVER.split("for job")[0].split("sys.argv[1])\n")[1]
        + f"main({words!r})"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(checkout),
    }
    subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        cwd=folder.parent,
        check=True,
        capture_output=True,
    )
    return digests(folder)


def compare(ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> int:
    """Print a line for each case; how many differ."""
    rows, wrong = [], 0
    for name, files in ours.items():
        different = sorted(
            file
            for file in files.keys() | theirs[name].keys()
            if files.get(file) != theirs[name].get(file)
        )
        wrong += bool(different) or not files
        rows.append(
            [
                name,
                len(files),
                "same bytes" if files and not different else ", ".join(different) or "no model",
            ]
        )
    print(table(["job", "files", "compared"], rows))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument(
        "--demo", action="store_true", help="compare the demo's model too; needs `make demo` once"
    )
    parser.add_argument(
        "--known",
        type=Path,
        help="JSON file of the other checkout's digests: read if it is there, else written",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        known = (
            json.loads(options.known.read_text())
            if options.known and options.known.exists()
            else None
        )
        inputs = write_inputs(folder / "inputs")
        theirs = known or run_cases(options.other.resolve(), inputs, folder / "other")
        if options.demo and "demo" not in theirs:
            theirs["demo"] = run_demo(options.other.resolve(), folder / "other-demo")
        if options.known:
            options.known.write_text(json.dumps(theirs))
        ours = run_cases(HERE, inputs, folder / "here")
        if options.demo:
            ours["demo"] = run_demo(HERE, folder / "demo")
    return compare(ours, theirs)


if __name__ == "__main__":
    sys.exit(main())
