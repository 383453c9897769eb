"""The GPU's kernels without a GPU: they compile for the devices they are for, and Triton's
interpreter computes what they stand for.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHAPES = {
    "_gram": ("z gram tile_rows tile_columns tokens width", "*{} *fp64 *i32 *i32 i32 i32"),
    "_pivot": (
        "matrix panel energy best_before at_before best_behind at_behind picked solid floor step"
        " width blocks",
        "*fp64 *fp64 *fp64 *fp64 *i32 *fp64 *i32 *i32 *i32 *fp64 i32 i32 i32",
    ),
}
CONSTANTS = {
    "_gram": {"TILE": 128, "CHUNK": 64},
    "_pivot": {"BLOCKS": 256, "COLUMNS": 64, "ROWS": 16},
}


@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [("_gram", "bf16", 90), ("_gram", "fp16", 80), ("_pivot", "", 80)],
)
def test_kernels_compile(name: str, dtype: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rayprune.workers.numerics import kernels

    names, types = (words.split() for words in SHAPES[name])
    signature = dict(zip(names, (kind.format(dtype) for kind in types), strict=True))
    signature |= dict.fromkeys(CONSTANTS[name], "constexpr")
    source = ASTSource(getattr(kernels, name), signature, CONSTANTS[name])
    stages = 4 if capability == 90 else 3
    options = {"num_warps": 8 if name == "_gram" else 4, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # a product on tensor cores, and a sum of its own for every chunk: added, not handed on
    if name == "_gram":
        assert ("wgmma" if capability == 90 else "mma.sync") in made.asm["ptx"]
    assert made.metadata.shared <= (227 if capability == 90 else 163) * 1024


INTERPRETED = """
import builtins
import numpy
import torch
import triton.runtime.interpreter as interpreter
from rayprune.workers.numerics import kernels, pivoting


class Whole(type):  # the interpreter takes numbers of arrays as numpy did before 2.4
    def __instancecheck__(cls, value):
        return isinstance(value, builtins.int)

    def __call__(cls, value=0):
        return builtins.int(value.item() if isinstance(value, numpy.ndarray) else value)


class Integer(metaclass=Whole):
    pass


interpreter.int = Integer
generator = torch.Generator().manual_seed(0)
for tokens, width in ((1, 5), (130, 140)):
    z = torch.randn(tokens, width, generator=generator)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for _ in range(2):
        kernels.add_gram_(gram, z)
    exact = 2 * z.double().T @ z.double()
    torch.testing.assert_close(gram.tril(), exact.tril(), rtol=0, atol=1e-4)
pivoting.PANEL = 8
for rank in (70, 20):
    z = torch.randn(90, 70, generator=generator, dtype=torch.float64)
    z *= torch.rand(70, generator=generator, dtype=torch.float64)
    z[:, torch.randperm(70, generator=generator)[rank:]] = 0
    gram = z.T @ z
    lower = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    for count in (1, 21, 70):
        found = pivoting.kernel_pivots_(lower.clone(), count, kernels)
        assert torch.equal(found, pivoting.cholesky_pivots_(gram.clone(), count))
        assert len(found) == min(rank, count)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kernels_compute_what_they_stand_for() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment | {"PYTHONPATH": f"{root}:{environment.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
