"""Bytes for our readers, led by the code that they reach (Atheris, libFuzzer): a reader returns, or
raises one of our own errors, in time and in bounded memory.

python -m tests.faults.fuzz_bytes weights --seconds 60
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rayprune", "yaml"]):
    from rayprune.orchestrator.reporting.report import read_report
    from rayprune.specs.errors import RaypruneError
    from rayprune.specs.loader import load_job
    from rayprune.workers.model.checkpoint import open_checkpoint
    from rayprune.workers.store.files import read_manifest

Read = Callable[[Path], object]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
HEADER = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
READERS: dict[str, tuple[str, Read, bytes]] = {
    "yaml": ("job.yaml", lambda folder: load_job(folder / "job.yaml"), b"model: {path: &a x}\n"),
    "weights": (
        "model.safetensors",
        open_checkpoint,
        len(HEADER).to_bytes(8, "little") + HEADER.encode() + bytes(16),
    ),
    "index": (
        "model.safetensors.index.json",
        open_checkpoint,
        b'{"weight_map": {"model.norm.weight": "a.safetensors"}}',
    ),
    "manifest": (
        "manifest.json",
        read_manifest,
        b'{"task": "a", "fingerprint": "b", "made_from": {}, "files": {"c":'
        b' {"bytes": 1, "sha256": "d"}}, "info": {}}',
    ),
    "report": ("report.json", read_report, b'{"schema_version": 1, "models": {"pruned": "m"}}'),
}
"""Of each target: the file that gets the bytes, who reads it, and bytes to begin with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    name, read, seed = READERS[options.target]
    folder = Path(tempfile.mkdtemp())
    place, seeds = folder / "place", folder / "seeds"
    place.mkdir()
    seeds.mkdir()
    (seeds / "first").write_bytes(seed)
    (place / "config.json").write_text(json.dumps(CONFIG))

    def one(data: bytes) -> None:
        (place / name).write_bytes(data)
        with suppress(RaypruneError):
            read(place)

    limits = [f"-max_total_time={options.seconds}", "-timeout=10", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(seeds)], one)
    try:
        atheris.Fuzz()  # ends the process where a reader fails
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
