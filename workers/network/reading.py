"""Tensors of a model folder, as views of its mapped files."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.folder import TensorInfo

CPU = torch.device("cpu")
_PART = 2**20
"""Numbers that are looked at together."""


def read_tensors(
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    prefix: str = "",
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Some tensors in their type on disk: views of the mapped files, or copies on a GPU. `prefix`
    completes their names.

    Raises:
        ModelError: a file cannot be read, or a tensor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({info.file for info in infos.values()}):
        with _opened(checkpoint, file) as handle:
            tensors |= {
                name: _found(handle, info).to(device)
                for name, info in infos.items()
                if info.file == file
            }
    # a sum takes no memory; one of finite values may pass the largest number
    for name in (name for name, total in _sums(tensors).items() if not math.isfinite(total)):
        if not _is_finite(tensors[name]):
            raise ModelError(
                f"{checkpoint.path / infos[name].file}: {prefix}{name} holds NaN or infinity; the"
                " checkpoint is damaged, fetch it again"
            )
    return tensors


def _found(handle: Any, info: TensorInfo) -> Tensor:
    tensor: Tensor = handle.get_tensor(info.stored)
    return info.place.of(tensor) if info.place else tensor


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The sum of every tensor, with one wait for the device."""
    sums = [
        t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).double() for t in tensors.values()
    ]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_PART))


@contextmanager
def _opened(checkpoint: Checkpoint, file: str) -> Iterator[Any]:
    """A file of the model, which was whole when the model was opened.

    Raises:
        ModelError: it no longer is.
    """
    path = checkpoint.path / file
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: cannot be read any more: {error}; was it changed or moved? put it back, and"
            " run the same command again"
        ) from None


def layer_tensors(
    checkpoint: Checkpoint, layer: int, device: torch.device = CPU
) -> dict[str, Tensor]:
    """All tensors of a layer, by their names in it, as `read_tensors` gives them.

    Raises:
        ModelError: one holds NaN or infinity.
    """
    prefix = checkpoint.model.prefix(layer)
    return read_tensors(checkpoint, checkpoint.layer_tensors(layer), prefix, device)


def digest_of(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo]) -> str:
    """SHA-256 over names, types, shapes and values of some tensors, whatever they hold."""
    digest = hashlib.sha256()
    for name, info in sorted(infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with _opened(checkpoint, info.file) as handle:
            values = _found(handle, info)
            digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
