"""Files of tensors that are checked by themselves: hidden states, states of trainings, what a
teacher has said.

Each holds a digest of its content and of its own name, so that what is read is known to be what was
written there.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rayprune.workers.store.files import write_tensors

_SEAL = "sha256"


def write_sealed(path: Path, tensors: Mapping[str, Tensor], belongs: str = "") -> None:
    """Write a file with its digest in its header; `belongs` says what it is part of, besides its
    own name and its folder's.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, held, (_SEAL, _digest(path, held, belongs)))


def read_sealed(path: Path, belongs: str = "") -> dict[str, Tensor] | None:
    """The tensors of a file, mapped from it; None where there is none, or it is torn, damaged or
    another one.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            seal = (handle.metadata() or {}).get(_SEAL)
            names = handle.keys()
            tensors = {name: handle.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return None
    return tensors if seal == _digest(path, tensors, belongs) else None


def _digest(path: Path, tensors: Mapping[str, Tensor], belongs: str) -> str:
    digest = hashlib.sha256(f"{belongs}\n{path.parent.name}/{path.name}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
