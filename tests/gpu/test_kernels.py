"""The kernels against what they stand for, on the shapes and values that models have."""

import pytest
import torch
from torch import Tensor

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics import linalg, pivoting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def activations(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Like a gated FFN's: heavy tails, a few massive columns and tokens, correlated columns."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    hidden = normal(tokens, width // 8) @ normal(width // 8, width) / width**0.5
    z_TF = torch.nn.functional.silu(4 * hidden) * (hidden + 0.3 * normal(tokens, width))
    z_TF[:, ::97] *= 8
    z_TF[::501] *= 30
    return z_TF.to(dtype)


def lower(gram_FF: Tensor) -> Tensor:
    return gram_FF.tril() + gram_FF.tril(-1).T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (63, 128), (1000, 1536), (8192, 1100)])
def test_gram_of_16_bit_activations(tokens: int, width: int, dtype: torch.dtype) -> None:
    z_TF = activations(tokens, max(8, width), dtype)[:, :width]
    exact_FF = z_TF.double().T @ z_TF.double()
    found = []
    for _ in range(2):
        gram_FF = torch.zeros(width, width, dtype=torch.float64, device="cuda")
        linalg.add_gram_(gram_FF, z_TF)
        linalg.add_gram_(gram_FF, z_TF)
        found.append(lower(gram_FF))
    assert torch.equal(*found)
    scale_F = exact_FF.diagonal().sqrt()
    errors = (found[0] / 2 - exact_FF).abs() / (scale_F[:, None] * scale_F)
    assert float(errors.nan_to_num().max()) < 1e-5


def test_a_direction_without_energy_keeps_none() -> None:
    few_TF = activations(512, 1024, torch.bfloat16).repeat(16, 1)
    gram_FF = torch.zeros(1024, 1024, dtype=torch.float64, device="cuda")
    linalg.add_gram_(gram_FF, few_TF)
    least = torch.linalg.eigvalsh(lower(gram_FF))[0] / gram_FF.diagonal().mean()
    assert float(least.abs()) < 3e-5


@pytest.mark.parametrize("width", [64, 400, 1536])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_pivots_are_those_of_the_plain_route(width: int, share: float) -> None:
    z_TF = activations(2 * width, width, torch.float32).double()
    gram_FF, count = z_TF.T @ z_TF, max(1, int(width * share))
    expected = pivoting.cholesky_pivots_(gram_FF.clone(), count)
    fast = linalg.kernels()
    assert fast is not None
    assert torch.equal(pivoting.kernel_pivots_(gram_FF.clone(), count, fast), expected)
    on_cpu = gram_FF.cpu()
    ones_F, scratch = torch.ones(width, dtype=torch.float64), Scratch(on_cpu.device, None)
    assert expected.tolist() == pivoting.pivot_gram(on_cpu, ones_F, count, scratch).tolist()


def test_pivots_stop_at_the_rank() -> None:
    z_TF = activations(800, 400, torch.float32).double()
    z_TF[:, torch.randperm(400)[150:].cuda()] = 0
    gram_FF = z_TF.T @ z_TF
    fast = linalg.kernels()
    assert fast is not None
    found = pivoting.kernel_pivots_(gram_FF.clone(), 400, fast)
    assert len(found) == 150
    assert torch.equal(found, pivoting.cholesky_pivots_(gram_FF.clone(), 400))
