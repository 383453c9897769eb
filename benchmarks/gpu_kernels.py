"""The package's own building blocks, alone: seconds, and whether what they compute is right. A part
of `benchmarks.gpu`.

Letters: T tokens of a micro-batch, D hidden, F width of the FFN, K of it that stay.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.linear_algebra import seconds
from benchmarks.random_model import SHAPES, num_parameters
from benchmarks.results import record, table, write
from rayprune.specs.job import CorrectionSpec
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.correction import Correction, correct
from rayprune.workers.numerics.linalg import WIDE, add_gram_, column_norms, mirror_
from rayprune.workers.numerics.pivoting import cholesky_pivots_, pivot_gram
from rayprune.workers.numerics.statistics import GramStatistic

COLUMNS = ["building block", "seconds", "TFLOP/s", "checks"]
LEADING = 1024
"""Columns that a result is compared on."""
PIVOTS = 128


@torch.inference_mode()
def kernels(options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Measure, print and record; every row as soon as it is there."""
    torch.backends.cuda.matmul.allow_tf32 = False  # as workers have it
    shape, device = SHAPES[options.shape], torch.device(options.device)
    tokens, width = options.micro_batch * options.sequence_length, shape["intermediate_size"]
    name, rows = f"gpu-kernels-{options.shape}", []
    intro = f"D {shape['hidden_size']}, F {width}, {tokens} tokens of bf16 a micro-batch.\n\n"
    for row in measured(shape, tokens, device):
        rows.append(row)
        print(*row, flush=True)
        write(name, intro + table(COLUMNS, rows), options.device, options.results)
    record(name, intro + table(COLUMNS, rows), options.device, options.results)
    return "done", {}


def measured(shape: dict[str, Any], tokens: int, device: torch.device) -> Iterator[list[str]]:
    """The rows of the table."""
    hidden, width, num_kept = shape["hidden_size"], shape["intermediate_size"], kept(shape)
    yield gram_row(width, tokens, device)
    scratch = Scratch(device, None)
    training, held_out = GramStatistic.empty(width, scratch), GramStatistic.empty(width, scratch)
    for seed in range(1 + -(-width // tokens)):
        statistic = training if seed else held_out
        statistic.update(activations(width, tokens, device, seed))
    statistics = training.finished(), held_out.finished()
    weight_DF = torch.randn(hidden, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale_F = column_norms(weight_DF).to(device)
    yield pivot_row(training, scale_F, num_kept)
    pivots = pivot_gram(training.gram_FF, scale_F, num_kept, scratch)
    yield correction_row(statistics, weight_DF, pivots.sort().values)


def kept(shape: dict[str, Any]) -> int:
    """Columns of the FFN that stay where it alone makes up for 20% of a layer."""
    width, step = shape["intermediate_size"], 128 if shape["intermediate_size"] > LEADING else 4
    removed = 0.2 * num_parameters(shape)[0] / (3 * shape["hidden_size"])
    return int((width - removed) // step * step)


def activations(width: int, tokens: int, device: torch.device, seed: int = 0) -> Tensor:
    """bf16, as a gated FFN's: correlated columns, heavy tails, a few massive columns and tokens."""
    rank = max(8, width // 8)
    fixed, drawn = (torch.Generator(device).manual_seed(number) for number in (2**31, seed))
    mixing = torch.randn(rank, width, device=device, generator=fixed) / rank**0.5
    sizes = torch.arange(1, rank + 1, device=device).rsqrt()
    inner = (torch.randn(tokens, rank, device=device, generator=drawn) * sizes) @ mixing
    noise = torch.randn(tokens, width, device=device, generator=drawn)
    z_TF = silu(4 * inner) * (inner + 0.3 * noise)
    z_TF[:, :: max(1, width // 16)] *= 8
    z_TF[:: max(1, tokens // 8)] *= 30
    return z_TF.bfloat16()


def steady(work: Any, device: torch.device) -> float:
    """Seconds of a call, after a first one that warms up."""
    return [seconds(work, device) for _ in range(2)][-1]


def alike(once: Tensor, again: Tensor) -> str:
    """Whether two runs gave the same, in words."""
    return f"two runs {'agree' if torch.equal(once, again) else 'DIFFER'} in all bits"


def gram(z_TF: Tensor) -> Tensor:
    """Z'Z by the package, both triangles."""
    width = z_TF.shape[1]
    gram_FF = torch.zeros(width, width, dtype=WIDE, device=z_TF.device)
    add_gram_(gram_FF, z_TF)
    return mirror_(gram_FF)


def gram_row(width: int, tokens: int, device: torch.device) -> list[str]:
    """Products of activations: error, smallest eigenvalue where 0 is exact, and repeatability."""
    z_TF = activations(width, tokens, device)
    once = gram(z_TF)
    again = alike(once, gram(z_TF))
    sum_FF = torch.zeros_like(once)
    taken = steady(lambda: add_gram_(sum_FF, z_TF), device)
    lead = z_TF[:, :LEADING].to(WIDE)
    exact = lead.T @ lead
    error = once[:LEADING, :LEADING] - exact
    worst = float(torch.linalg.eigvalsh(error).abs().max() / exact.diagonal().mean())
    few_TF = activations(width, tokens // 16, device).repeat(16, 1)  # directions without energy
    empty = gram(few_TF)[:LEADING, :LEADING]
    smallest = float(torch.linalg.eigvalsh(empty)[0] / empty.diagonal().mean())
    return [
        f"add_gram_, {len(z_TF)} x {width}",
        f"{taken:.4f}",
        f"{len(z_TF) * width**2 / taken / 1e12:.3g}",
        f"over the mean diagonal: error {worst:.1e} in the 2-norm, smallest eigenvalue"
        f" {smallest:.1e} where 0 is exact; {again}",
    ]


def pivot_row(statistic: GramStatistic, scale_F: Tensor, count: int) -> list[str]:
    """Pivots, compared with the CPU's on the leading columns."""
    gram_FF, scratch, width = statistic.gram_FF, statistic.scratch, len(scale_F)
    taken = steady(lambda: pivot_gram(gram_FF, scale_F, count, scratch), scratch.device)
    lead, scale = gram_FF[:LEADING, :LEADING].contiguous(), scale_F[:LEADING]
    num_compared = min(PIVOTS, count)
    found = pivot_gram(lead, scale, num_compared, scratch).cpu()
    scaled = (lead * scale[:, None] * scale).cpu()
    right = cholesky_pivots_(scaled, num_compared)
    num_equal = int((found[: len(right)] == right).sum())
    return [
        f"pivot_gram, {count} of {width}",
        f"{taken:.3f}",
        f"{pivot_flops(width, count) / taken / 1e12:.3g}",
        f"{num_equal} of the first {len(right)} pivots of {len(scale)} columns are those of the"
        " same rule on the CPU",
    ]


def pivot_flops(width: int, count: int) -> float:
    """Of a pivoted Cholesky that ends after so many columns."""
    return (width**3 - (width - count) ** 3) / 3


def correction_row(
    statistics: tuple[GramStatistic, GramStatistic], weight_DF: Tensor, kept_K: Tensor
) -> list[str]:
    """The corrected weight; a correction uses its statistics up."""
    copies = [[replace(one, gram_FF=one.gram_FF.clone()) for one in statistics] for _ in range(2)]
    found: list[Correction] = []

    def work() -> None:
        options = CorrectionSpec()
        found.append(correct(*copies.pop(), weight_DF, kept_K, options, weight_DF.dtype))

    taken = steady(work, kept_K.device)
    once, again = found
    return [
        f"correct, {len(kept_K)} kept of {weight_DF.shape[1]}, {len(weight_DF)} outputs",
        f"{taken:.3f}",
        "",
        f"damping {again.damping:g}, error {again.training_error:.3f} in training and"
        f" {again.held_out_error:.3f} held out; {alike(once.weight_DK, again.weight_DK)}",
    ]
