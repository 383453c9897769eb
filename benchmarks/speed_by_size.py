"""Speed against size: cuts of a Llama's FFN by 10 to 50%, in widths that engines like and in
others, beside the dense model in turns.

    python -m benchmarks.speed_by_size MODEL [--rounds 3] [--llama.cpp]

Speed depends on shapes, so the cuts are the first channels of MODEL (Llama, Mistral, Qwen), and
nothing is pruned. Transformers in float32 on one thread; with `--llama.cpp` F16, Q8_0 and, where
cyllama is installed for quantising, Q4_K_M as well. Writes results/speed-by-size_cpu_DATE.md.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.engines import quantised, speed, versions
from benchmarks.results import record, table
from rayprune.specs.errors import ResourceError
from rayprune.workers.formats.gguf_file import write_gguf
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.tools.bench import Conditions, bench

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
LIKED, OTHER = 64, 10
"""Widths are multiples of the first, and the same less the second: a multiple of 2 alone."""
COLUMNS = ("width", "decoder removed", "parameters", "prefill", "decode")


def widths(model: Path) -> Iterator[int]:
    """FFN widths that remove about the fractions of the decoder, of both kinds."""
    checkpoint = open_checkpoint(model)
    (ffn,) = [group for group in checkpoint.model.groups if group.kind == "ffn"]
    layer = checkpoint.decoder_parameters / checkpoint.num_layers
    for fraction in FRACTIONS:
        wanted = ffn.num_units - fraction * layer / ffn.unit_parameters
        liked = max(LIKED, round(wanted / LIKED) * LIKED)
        yield from (liked, liked - OTHER)


def cut(model: Path, width: int, folder: Path) -> Path:
    """The model with the first channels of every FFN, written to a folder."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    config = json.loads((model / "config.json").read_text()) | {"intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            kind = name.rpartition("_proj")[0].rpartition(".")[2]
            axis = {"gate": 0, "up": 0, "down": 1}.get(kind)
            tensors[name] = tensor if axis is None else tensor.narrow(axis, 0, width).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def in_transformers(models: Sequence[Path], rounds: int) -> list[tuple[float, float]]:
    """Of every model prefill and decode over the first one's."""
    found = bench(models, Conditions(rounds=rounds))
    return [(each.prefill_ratio, each.decode_ratio) for each in found]


def in_llama_cpp(files: Sequence[Path], rounds: int) -> list[tuple[float, float]]:
    """The same of files, in llama.cpp."""
    times = [[speed(file) for file in files] for _ in range(rounds)]
    return [
        tuple(statistics.median(r[which][k] / r[0][k] for r in times) for k in (0, 1))  # type: ignore[misc]
        for which in range(len(files))
    ]


def forms(models: Sequence[Path], folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Files for llama.cpp of every model, by type."""
    for target in ("gguf", "gguf-q8_0"):
        into = [folder / target / model.name for model in models]
        files = [
            place / write_gguf(m, place, target)[0] for m, place in zip(models, into, strict=True)
        ]
        yield files[0].stem, files
    try:
        yield (
            "Q4_K_M",
            [
                quantised(
                    folder / "gguf" / model.name / "model-F16.gguf", folder / "q4" / model.name
                )
                for model in models
            ],
        )
    except ResourceError as error:
        print(error, flush=True)


def main() -> None:
    """Cut, measure, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama.cpp", action="store_true", dest="llama_cpp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = [cut(options.model, width, folder / str(width)) for width in widths(options.model)]
        models = [options.model, *cuts]
        content = [_table("transformers, float32", models, in_transformers(models, options.rounds))]
        for kind, files in forms(models, folder) if options.llama_cpp else ():
            ratios = in_llama_cpp(files, options.rounds)
            content.append(_table(f"llama.cpp, {kind}", models, ratios, files))
    record("speed-by-size", f"{versions()}.\n\nTimes dense, medians.\n\n" + "\n\n".join(content))


def _table(
    title: str,
    models: Sequence[Path],
    ratios: Sequence[tuple[float, float]],
    files: Sequence[Path] = (),
) -> str:
    dense, *cuts = map(open_checkpoint, models)
    rows = []
    for number, each in enumerate(cuts, 1):
        row = [
            each.path.name,
            f"{1 - each.decoder_parameters / dense.decoder_parameters:.1%}",
            f"{each.parameters / dense.parameters:.2f}",
            *(f"{ratio:.2f}" for ratio in ratios[number]),
        ]
        size = files and f"{files[number].stat().st_size / files[0].stat().st_size:.2f}"
        rows.append([*row, size] if size else row)
    columns = [*COLUMNS, *(["bytes"] if files else [])]
    return f"## {title}\n\n{table(columns, rows)}"


if __name__ == "__main__":
    main()
