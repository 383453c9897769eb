"""Sums as tensor cores form them, emulated: what they cut off must not change what is kept or how
it is corrected.

The emulation: 16 products and the sum so far are aligned to the largest of them, each is cut off
two bits behind fp32's last, and the result at its last (Fasi, Higham, Mikaitis, Pranesh, PeerJ CS
7:e330).
Letters: T tokens, F width.
"""

import pytest
import torch
from torch import Tensor

from rayprune.specs.job import CorrectionSpec
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.numerics.correction import correct
from rayprune.workers.numerics.methods import select
from rayprune.workers.numerics.statistics import GramStatistic
from tests.helpers import SCRATCH

WIDTH, HIDDEN, KEPT, STEP = 96, 40, 68, 16
CHUNK_TOKENS = 64  # as in `kernels`, which only Triton can import


def cut_off(values: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Towards zero, at so many bits behind the leading one of the largest."""
    unit = torch.exp2(largest.abs().clamp(min=1e-300).log2().floor() - bits)
    return torch.trunc(values / unit) * unit


def summed(sum_FF: Tensor, z_TF: Tensor) -> Tensor:
    """The sum with the products of 16 tokens."""
    terms = torch.cat([sum_FF[None], z_TF[:, :, None] * z_TF[:, None]])
    total = cut_off(terms, terms.abs().amax(0), 25).sum(0)
    return cut_off(total, total, 23)


def emulated(z_TF: Tensor, chunk: int) -> Tensor:
    """Z'Z: a fresh sum for every chunk; chunks added in fp32 with Kahan's correction, the whole in
    fp64.
    """
    total, rest = torch.zeros(2, z_TF.shape[1], z_TF.shape[1])
    for tokens in z_TF.double().split(chunk):
        part = torch.zeros_like(total, dtype=torch.float64)
        for some in tokens.split(STEP):
            part = summed(part, some)
        mended = part.float() - rest
        together = total + mended
        rest = (together - total) - mended
        total = together
    return total.double() - rest.double()


def activations(tokens: int, seed: int) -> Tensor:
    """Like a gated FFN's, in bf16: heavy tails, massive tokens and columns, correlated columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(7)) / 12**0.5
    hidden = torch.randn(tokens, 12, generator=generator) @ mixing
    noise = torch.randn(tokens, WIDTH, generator=generator)
    z_TF = torch.nn.functional.silu(4 * hidden) * (hidden + 0.3 * noise)
    z_TF[:, ::31] *= 8
    z_TF[::501] *= 30
    return z_TF.bfloat16().double()


def statistic(gram_FF: Tensor) -> GramStatistic:
    made = GramStatistic.empty(WIDTH, SCRATCH)
    made.gram_FF.copy_(gram_FF)
    return made


def test_what_tensor_cores_cut_off_changes_no_decision() -> None:
    training, held_out = activations(4096, 0), activations(1024, 1)
    weight = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(3))
    exact = [z_TF.T @ z_TF for z_TF in (training, held_out)]
    found = [emulated(z_TF, CHUNK_TOKENS) for z_TF in (training, held_out)]
    results = []
    for grams in (exact, found):
        fits = [statistic(gram_FF) for gram_FF in grams]
        kept = select(StatOptions(), fits[0], weight, 1, KEPT)
        results.append((kept, correct(*fits, weight, kept, CorrectionSpec(), torch.float64)))
    (kept, right), (same, near) = results
    assert torch.equal(kept, same)
    assert near.damping == right.damping
    assert near.held_out_error == pytest.approx(right.held_out_error, rel=1e-6)
    assert near.training_error == pytest.approx(right.training_error, rel=1e-6)
    change = torch.linalg.norm(near.weight_DK - right.weight_DK)
    assert float(change / torch.linalg.norm(right.weight_DK)) < 1e-5


def test_a_fresh_sum_for_every_chunk_is_what_it_takes() -> None:
    few = activations(48, 2).repeat(64, 1)  # fewer different tokens than columns
    exact = few.T @ few
    mean = float(exact.diagonal().mean())
    errors = {chunk: emulated(few, chunk) - exact for chunk in (CHUNK_TOKENS, len(few))}
    worst = {c: float(torch.linalg.eigvalsh(e).abs().max()) / mean for c, e in errors.items()}
    least = {c: float(torch.linalg.eigvalsh(exact + e)[0]) / mean for c, e in errors.items()}
    assert worst[CHUNK_TOKENS] < 3e-5
    assert least[CHUNK_TOKENS] > -1e-6
    assert worst[len(few)] > 10 * worst[CHUNK_TOKENS]
    assert least[len(few)] < 3 * least[CHUNK_TOKENS]
