"""Saved states of a training: what every rank holds of the trained parameters and of the
optimizer, one sealed safetensors file a rank. No pickles.

Rows of a parameter that FSDP2 has spread lie in the ranks' files in order, so that a training goes
on from there on any number of ranks. A state is whole when the files of all its ranks are there.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayprune.workers.passes.sealed import read_sealed, write_sealed
from rayprune.workers.store.layout import STARTED_FILE
from rayprune.workers.store.training_stage import STATE_PREFIX
from rayprune.workers.training.objectives import first_row, local_part

_WEIGHT, _STEP, _MOMENTS = "weight", "step", ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"rank-\d{4}-of-(\d{4})\.safetensors")
Files = Sequence[Mapping[str, Tensor]]
"""What all ranks have saved, rank by rank."""


def saved_steps(folder: Path) -> list[int]:
    """Steps whose states are whole, ascending."""
    return sorted(
        int(state.name.removeprefix(STATE_PREFIX))
        for state in folder.glob(f"{STATE_PREFIX}{'[0-9]' * 7}")
        if state.is_dir() and _files_of(state)
    )


def save_state(
    folder: Path,
    step: int,
    rank: int,
    world: int,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Save what this rank holds before a step, and what lies `beside` it; what every rank holds
    whole is saved by the first one.
    """
    everything = {
        f"{kind}/{name}": tensor
        for name, parameter in trained.items()
        for kind, tensor in _parts(parameter, optimizer).items()
    } | dict(beside)
    tensors = {
        name: local_part(tensor)
        for name, tensor in everything.items()
        if rank == 0 or isinstance(tensor, DTensor)
    }
    write_sealed(_folder(folder, step) / _name(rank, world), tensors, _belongs(folder))


def open_state(folder: Path, step: int, trained: Mapping[str, nn.Parameter]) -> Files | None:
    """The state before a step, saved by however many ranks, mapped from its files; None where one
    is damaged, or of another training.
    """
    found = [read_sealed(file, _belongs(folder)) for file in _files_of(_folder(folder, step))]
    files = [tensors for tensors in found if tensors is not None]
    whole = 0 < len(files) == len(found)
    return files if whole and all(_fits(files, *item) for item in trained.items()) else None


@torch.no_grad()
def take_over(
    files: Files, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Give parameters and optimizer what this rank holds of a saved state."""
    for name, parameter in trained.items():
        parts = _fresh(parameter)
        for kind, tensor in parts.items():
            fill(tensor, saved(files, f"{kind}/{name}"))
        optimizer.state[parameter] = {k: tensor for k, tensor in parts.items() if k != _WEIGHT}


def remove_state(folder: Path, step: int) -> None:
    """Remove a saved state."""
    shutil.rmtree(_folder(folder, step), ignore_errors=True)


def _folder(folder: Path, step: int) -> Path:
    return folder / f"{STATE_PREFIX}{step:07d}"


def _name(rank: int, world: int) -> str:
    return f"rank-{rank:04d}-of-{world:04d}.safetensors"


def _files_of(state: Path) -> list[Path]:
    """The files of all ranks in order; none where one is missing."""
    worlds = {int(found[1]) for file in state.iterdir() if (found := _NAME.fullmatch(file.name))}
    for world in sorted(worlds):
        files = [state / _name(rank, world) for rank in range(world)]
        if all(file.is_file() for file in files):
            return files
    return []


def _belongs(folder: Path) -> str:
    """The training that a state belongs to."""
    started = folder / STARTED_FILE
    return started.read_text(encoding="utf-8") if started.is_file() else ""


def _parts(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A parameter and what the optimizer keeps of it."""
    kept = optimizer.state.get(parameter)
    return {_WEIGHT: parameter.data, **kept} if kept else _fresh(parameter)


def _fresh(parameter: nn.Parameter) -> dict[str, Tensor]:
    """The same, as they are before the first step of AdamW."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    moments = {name: torch.zeros_like(parameter.data) for name in _MOMENTS}
    return {_WEIGHT: parameter.data, _STEP: step, **moments}


def saved(files: Files, key: str) -> list[Tensor]:
    """What the ranks have saved of a tensor, in the order of its rows."""
    return [tensors[key] for tensors in files if key in tensors]


def _fits(files: Files, name: str, parameter: nn.Parameter) -> bool:
    """Whether the saved rows make up a whole parameter and its moments."""
    shape, steps = parameter.shape, saved(files, f"{_STEP}/{name}")
    return [step.dim() for step in steps] == [0] and all(
        _shape_of(saved(files, f"{kind}/{name}")) == shape for kind in (_WEIGHT, *_MOMENTS)
    )


def _shape_of(parts: Sequence[Tensor]) -> torch.Size | None:
    """The shape of parts one below the other; None where they do not belong together."""
    if len({part.shape[1:] for part in parts}) != 1:
        return None
    if parts[0].dim() == 0:
        return parts[0].shape if len(parts) == 1 else None
    return torch.Size([sum(len(part) for part in parts), *parts[0].shape[1:]])


def fill(tensor: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy the saved rows that this rank holds."""
    held, first, begin = local_part(tensor), first_row(tensor), 0
    if held.dim() == 0:
        held.copy_(parts[0])
        return
    for part in parts:
        start, stop = max(first, begin), min(first + len(held), begin + len(part))
        if start < stop:
            held[start - first : stop - first].copy_(part[start - begin : stop - begin])
        begin += len(part)
