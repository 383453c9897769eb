"""The zeros of a folder's matrices: whether they are where they should be, and on a GPU the tensors
that it multiplies faster for them.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rayprune.specs.errors import VerificationError
from rayprune.workers.model.folder import INDEX_NAME, read_json
from rayprune.workers.model.sparsity import (
    FAST_COLUMNS,
    FAST_ROWS,
    SEMI_STRUCTURED,
    Sparsity,
    Zeros,
    is_semi_structured,
    read_sparsity,
)
from rayprune.workers.network.load_check import loaded

FAST_TYPES = (torch.float16, torch.bfloat16)


def zeros_of(weight: Tensor, transposed: bool) -> Zeros:
    """The zeros of a matrix, (out, in) unless transposed."""
    return Zeros(int((weight == 0).sum()), weight.numel(), transposed)


def check_zeros(
    weight: Tensor, told: Zeros, group: int | None, sparsity: float, where: str
) -> None:
    """Check that a matrix has the zeros that are told of it, and of every so many neighbouring
    inputs of an output at least that part.

    Raises:
        VerificationError: it has not.
    """
    if zeros_of(weight, told.transposed) != told:
        raise VerificationError(f"{where}: has other zeros than were told of it")
    if group is None:
        return
    weight_DF = weight.T if told.transposed else weight
    nonzero = (weight_DF.reshape(-1, group) != 0).sum(1)
    if int(nonzero.max()) > group - int(group * sparsity):
        raise VerificationError(
            f"{where}: of {group} neighbouring weights {int(nonzero.max())} are not zero"
        )


def check_folder_zeros(folder: Path) -> None:
    """Check all matrices of an exported folder against its `sparsity.json`.

    Raises:
        VerificationError: one has other zeros.
        ModelError: the folder says nothing of zeros.
    """
    about = read_sparsity(folder)
    index: Any = read_json(folder / INDEX_NAME)["weight_map"]
    for file in sorted(set(index.values())):
        with safe_open(folder / file, framework="pt") as handle:
            for name in set(handle.keys()) & about.tensors.keys():
                told, weight = about.tensors[name], handle.get_tensor(name)
                where = f"{folder / file}: {name}"
                check_zeros(weight, told, about.group, about.sparsity, where)


def load_sparse(folder: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> Any:
    """The model of a folder that `method: sparse` has written. On a GPU its matrices with a 2:4
    pattern become semi-structured tensors of torch, which tensor cores multiply faster; elsewhere
    it runs dense, and a warning says so.

    `device` is one of torch's, `auto` a GPU where there is one; `dtype` None: bfloat16 on a GPU,
    else float32.

    Raises:
        ModelError: the folder says nothing of zeros.
        VerificationError: a matrix has other zeros than the folder says.
    """
    folder = Path(folder).absolute()
    about = read_sparsity(folder)
    check_folder_zeros(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    model = loaded(folder, dtype).to(device).eval()
    reason = (
        f"on {device} torch has no products with semi-structured tensors"
        if not on_gpu
        else f"tensor cores multiply {SEMI_STRUCTURED}, not {about.pattern}"
        if about.pattern != SEMI_STRUCTURED
        else f"tensor cores multiply 16-bit numbers, not {dtype}"
        if dtype not in FAST_TYPES
        else None
    )
    if reason:
        warnings.warn(f"{folder}: runs dense: {reason}", stacklevel=2)
        return model
    dense = _make_semi_structured(model, about)
    if dense:
        warnings.warn(
            f"{folder}: {len(dense)} matrices run dense, since their sizes are no multiples of"
            f" {FAST_ROWS} x {FAST_COLUMNS} or they are (in, out): {dense[0]} ...",
            stacklevel=2,
        )
    return model


def _make_semi_structured(model: Any, about: Sparsity) -> list[str]:
    """Have a model's matrices be semi-structured tensors; the names of those that cannot be."""
    dense = []
    for name, told in about.tensors.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        fits = isinstance(module, nn.Linear) and is_semi_structured(
            module.weight.shape, told.transposed
        )
        if not fits:
            dense.append(name)
            continue
        fast = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(fast, requires_grad=False)
    return dense
