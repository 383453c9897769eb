"""Speed against size: cuts of a Llama's layers by 10 to 50%, of FFNs alone in widths that engines
like and in others, or with a KV group less, beside the dense model in turns.

    python -m benchmarks.speed_by_size MODEL [--rounds 3] [--fractions 0.3] [--llama.cpp]

Speed depends on shapes, so the cuts are the first units of MODEL (Llama, Mistral, Qwen), and
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
COLUMNS = ("KV groups", "width", "decoder removed", "parameters", "prefill", "decode")
Shape = tuple[int, int]
"""KV groups and FFN channels of every layer."""


def shapes(model: Path, fractions: Sequence[float]) -> Iterator[Shape]:
    """What stays where about the fractions of the decoder go: FFN channels alone, in widths of
    both kinds, or first a KV group with its query heads.
    """
    checkpoint = open_checkpoint(model)
    ffn, heads = (
        next(group for group in checkpoint.model.groups if group.kind == kind)
        for kind in ("ffn", "attention")
    )
    layer = checkpoint.decoder_parameters / checkpoint.num_layers
    for fraction in fractions:
        for fewer in (0, 1):
            gone = fraction * layer - fewer * heads.unit_parameters
            liked = round((ffn.num_units - gone / ffn.unit_parameters) / LIKED) * LIKED
            if LIKED <= liked <= ffn.num_units:
                yield heads.num_units - fewer, liked
                if not fewer:
                    yield heads.num_units, liked - OTHER


def cut(model: Path, shape: Shape, folder: Path) -> Path:
    """The model with the first KV groups and channels of every layer, written to a folder."""
    groups, width = shape
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    config = json.loads((model / "config.json").read_text())
    heads, of = config["num_attention_heads"], config["num_key_value_heads"]
    config["head_dim"] = size = config.get("head_dim") or config["hidden_size"] // heads
    config |= {"num_key_value_heads": groups, "num_attention_heads": groups * heads // of}
    config |= {"intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(config))
    values, queries = groups * size, groups * heads // of * size
    ends = {"gate": (0, width), "up": (0, width), "down": (1, width)}
    ends |= {"q": (0, queries), "o": (1, queries), "k": (0, values), "v": (0, values)}
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            end = ends.get(name.rpartition("_proj")[0].rpartition(".")[2])
            tensors[name] = tensor.narrow(end[0], 0, end[1]).contiguous() if end else tensor
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
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--llama.cpp", action="store_true", dest="llama_cpp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = [
            cut(options.model, shape, folder / "{} x {}".format(*shape))
            for shape in shapes(options.model, options.fractions)
        ]
        models = [options.model, *cuts]
        content = [_table("transformers, float32", models, in_transformers(models, options.rounds))]
        for kind, files in forms(models, folder) if options.llama_cpp else ():
            ratios = in_llama_cpp(files, options.rounds)
            content.append(_table(f"llama.cpp, {kind}", models, ratios, files))
    some = "" if options.fractions == FRACTIONS else "".join(f"-{f:.0%}" for f in options.fractions)
    name = f"speed-by-size{some.replace('%', '')}"
    record(name, f"{versions()}.\n\nTimes dense, medians.\n\n" + "\n\n".join(content))


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
            *each.path.name.split(" x "),
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
