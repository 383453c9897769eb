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
from rayprune.workers.model.description import Consumer
from rayprune.workers.model.folder import TensorInfo

_PART = 2**20
"""Numbers that are looked at together."""


def read_tensors(
    checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], prefix: str = ""
) -> dict[str, Tensor]:
    """Views of the mapped files: some tensors in their type on disk; `prefix` completes the names.

    Raises:
        ModelError: a file cannot be read, or a tensor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({info.file for info in infos.values()}):
        with _opened(checkpoint, file) as handle:
            tensors |= {
                name: handle.get_tensor(info.stored)
                for name, info in infos.items()
                if info.file == file
            }
    for name, tensor in tensors.items():
        # a sum takes no memory; one of finite values may pass the largest number
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if not math.isfinite(tensor.sum(dtype=wide)) and not _is_finite(tensor):
            raise ModelError(
                f"{checkpoint.path / infos[name].file}: {prefix}{name} holds NaN or infinity; the"
                " checkpoint is damaged, fetch it again"
            )
    return tensors


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


def layer_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """All tensors of a layer, by their names in it.

    Raises:
        ModelError: one holds NaN or infinity.
    """
    prefix = checkpoint.model.prefix(layer)
    return read_tensors(checkpoint, checkpoint.layer_tensors(layer), prefix)


def consumer_weight(checkpoint: Checkpoint, layer: int, consumer: Consumer) -> Tensor:
    """A consumer's weight (D, F), in its type on disk.

    Raises:
        ModelError: it holds NaN or infinity.
    """
    infos = {consumer.weight: checkpoint.layer_tensors(layer)[consumer.weight]}
    weight = read_tensors(checkpoint, infos, checkpoint.model.prefix(layer))[consumer.weight]
    return weight.T if consumer.transposed else weight


def digest_of(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo]) -> str:
    """SHA-256 over names, types, shapes and values of some tensors, whatever they hold."""
    digest = hashlib.sha256()
    for name, info in sorted(infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with _opened(checkpoint, info.file) as handle:
            values: Tensor = handle.get_tensor(info.stored)
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
