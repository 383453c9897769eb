"""Products with matrices of which half is zero: dense, 2:4 as torch's semi-structured tensors (on a
GPU), and whole blocks as torch's BSR. A part of `benchmarks.gpu`; by itself

    python -m benchmarks.sparse_products [--shape llama-2-7b] [--tokens 1 16 512] [--device cuda]

measures the matrices of a layer of that shape: medians, after a first use. On a GPU in bf16, on a
CPU in fp32 on one thread. Writes benchmarks/results/sparse-products-SHAPE_DEVICE_DATE.md.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.linear_algebra import seconds
from benchmarks.random_model import SHAPES
from benchmarks.results import RESULTS, record, table, write

TIMES = 9
BLOCK = 64
"""Rows and columns of a block."""
COLUMNS = ["out x in", "tokens", "dense, ms", "2:4, ms", "times", f"BSR {BLOCK} x {BLOCK}", "times"]


def pruned_2_4(weight_DF: Tensor) -> Tensor:
    """The two smallest of every four weights become zero."""
    by_four = weight_DF.view(-1, 4)
    kept = torch.zeros_like(by_four).scatter_(1, by_four.abs().topk(2, dim=1).indices, 1.0)
    return (by_four * kept).view_as(weight_DF)


def in_blocks(weight_DF: Tensor) -> Tensor:
    """Every second block becomes zero, as a checkerboard; BSR."""
    rows, columns = (torch.arange(size, device=weight_DF.device) for size in weight_DF.shape)
    kept = (rows[:, None] // BLOCK + columns // BLOCK) % 2 == 0
    return (weight_DF * kept).to_sparse_bsr((BLOCK, BLOCK))


def measured(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds: the median of some calls after a first one."""
    work()
    return 1000 * median(seconds(work, device) for _ in range(TIMES))


def row(weight_DF: Tensor, tokens: int) -> list[str]:
    """One matrix and number of tokens."""
    device, (outputs, inputs) = weight_DF.device, weight_DF.shape
    x_TF = torch.randn(tokens, inputs, device=device, dtype=weight_DF.dtype)
    dense = measured(lambda: linear(x_TF, weight_DF), device)
    found = [f"{outputs} x {inputs}", str(tokens), f"{dense:.3f}"]
    half: list[Tensor | None] = [None, None]
    if device.type == "cuda":
        half[0] = torch.sparse.to_sparse_semi_structured(pruned_2_4(weight_DF))
    half[1] = in_blocks(weight_DF)
    for weight in half:
        if weight is None:
            found += ["", ""]
            continue
        taken = measured(lambda weight=weight: linear(x_TF, weight), device)  # type: ignore[misc]
        found += [f"{taken:.3f}", f"{dense / taken:.2f}"]
    return found


def rows(shape: str, tokens: Sequence[int], device: torch.device) -> Iterator[list[str]]:
    """Attention's square matrix, up and down."""
    hidden, width = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for outputs, inputs in ((hidden, hidden), (width, hidden), (hidden, width)):
        weight_DF = torch.randn(outputs, inputs, device=device, dtype=dtype)
        for count in tokens:
            yield row(weight_DF, count)


@torch.inference_mode()
def products(options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Measure, print and record; every row as soon as it is there."""
    name, found = f"sparse-products-{options.shape}", []
    for line in rows(options.shape, options.tokens, torch.device(options.device)):
        found.append(line)
        print(*line, flush=True)
        write(name, table(COLUMNS, found), options.device, options.results)
    record(name, table(COLUMNS, found), options.device, options.results)
    return "done", {}


def main() -> None:
    """Measure one shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    torch.set_num_threads(1)
    products(parser.parse_args())


if __name__ == "__main__":
    main()
