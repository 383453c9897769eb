"""Time and memory of one layer's decision: selection and correction of a wide consumer.

    python -m benchmarks.linear_algebra [--widths 4096 11008] [--threads 1] [--device cpu] [--folder
    DIR]

Statistics of random activations with unlike columns, four fifths of the columns kept, a bf16 weight
with as many outputs as a Llama layer of that width, two damping candidates; matrices in memory,
then in mapped files under DIR. Writes benchmarks/results/linear-algebra_DEVICE_DATE.md. Private
memory is RssAnon of /proc/self/status.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.results import record, table
from rayprune.specs.job import CorrectionSpec
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.correction import correct
from rayprune.workers.numerics.linalg import WIDE, cholesky_solver, column_norms
from rayprune.workers.numerics.methods import select
from rayprune.workers.numerics.pivoting import pivot_gram
from rayprune.workers.numerics.statistics import GramStatistic

OUTPUTS = {1536: 576, 4096: 4096, 8192: 8192, 11008: 4096, 14336: 4096, 28672: 8192}
KEPT = 0.8
CANDIDATES = (1e-2, 1e-1)
MICRO_BATCH = 2048
COLUMNS = [
    "F",
    "D",
    "K",
    "matrices",
    "potrf s",
    "pivots s",
    "ratio",
    "solve s",
    "selection s",
    "correction s",
    "peak private GiB",
]


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of an action, the device's work included."""
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def statistic(width: int, tokens: int, seed: int, scratch: Scratch) -> GramStatistic:
    """Of random activations whose columns differ in size."""
    generator = torch.Generator(scratch.device).manual_seed(seed)
    sizes_F = (
        torch.rand(
            width, generator=torch.Generator(scratch.device).manual_seed(0), device=scratch.device
        )
        + 0.5
    )
    result = GramStatistic.empty(width, scratch)
    for start in range(0, tokens, MICRO_BATCH):
        rows = min(MICRO_BATCH, tokens - start)
        result.update(
            torch.randn(rows, width, generator=generator, device=scratch.device) * sizes_F
        )
    result.state()
    return result


def plain_cholesky(gram_FF: Tensor, scratch: Scratch) -> float:
    """Seconds of an unpivoted Cholesky factorisation of a copy."""
    copy_FF = scratch.empty(*gram_FF.shape, dtype=WIDE).copy_(gram_FF)
    if copy_FF.is_cuda:
        return seconds(lambda: torch.linalg.cholesky_ex(copy_FF), copy_FF.device)
    return seconds(
        lambda: lapack.dpotrf(copy_FF.numpy().T, lower=0, overwrite_a=1, clean=0), copy_FF.device
    )


def solve_seconds(gram_FF: Tensor, num_kept: int, outputs: int, scratch: Scratch) -> float:
    """Seconds of one damped solve for all outputs, its factorisation included."""
    gram_KK = scratch.empty(num_kept, num_kept, dtype=WIDE).copy_(gram_FF[:num_kept, :num_kept])
    ridge = float(torch.diagonal(gram_KK).mean())

    def solve() -> None:
        solver = cholesky_solver(gram_KK, ridge)
        for rows in gram_FF[:outputs, :num_kept].split(512):
            solver(rows.contiguous())

    return seconds(solve, gram_FF.device)


def row(width: int, scratch: Scratch, where: str) -> list[object]:
    """One line of the table."""
    device, outputs = scratch.device, OUTPUTS.get(width, width)
    num_kept = int(KEPT * width) // 2 * 2
    weight_DF = torch.randn(outputs, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    training, held_out = (
        statistic(width, width + 512, 2, scratch),
        statistic(width, width // 4, 3, scratch),
    )
    scale_F = column_norms(weight_DF).to(device)
    plain = plain_cholesky(training.gram_FF, scratch)
    pivoted = seconds(lambda: pivot_gram(training.gram_FF, scale_F, num_kept, scratch), device)
    solving = solve_seconds(training.gram_FF, num_kept, outputs, scratch)
    kept: list[Tensor] = []
    options = CorrectionSpec(candidates=CANDIDATES)
    with PeakMemory() as peak:
        selecting = seconds(
            lambda: kept.append(select(StatOptions(), training, weight_DF, 1, num_kept)), device
        )
        correcting = seconds(
            lambda: correct(training, held_out, weight_DF, kept[0], options, torch.bfloat16), device
        )
    numbers = [plain, pivoted, pivoted / plain, solving, selecting, correcting, peak.bytes / 2**30]
    return [width, outputs, num_kept, where, *(f"{number:.2f}" for number in numbers)]


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="a folder on a disk, for the mapped files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    device = torch.device(options.device)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        scratches = {"memory": Scratch(device, None)} | (
            {"files": Scratch(device, Path(folder))} if options.device == "cpu" else {}
        )
        for width in options.widths:
            for where, scratch in scratches.items():
                rows.append(row(width, scratch, where))
                print(*rows[-1], file=sys.stderr, flush=True)
    record("linear-algebra", table(COLUMNS, rows), options.device)


if __name__ == "__main__":
    main()
