"""Statistics of a layer in a file, where they are kept for other runs."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.statistics import restored
from rayprune.workers.numerics.statistics.protocol import State
from rayprune.workers.passes.stream import Fits
from rayprune.workers.store.files import write_tensors
from rayprune.workers.store.layout import STATISTICS_FILE

_SIDES = ("training", "held-out")


def write_fits(folder: Path, fits: Mapping[str, Fits]) -> None:
    """Write the finished statistics of some groups: of a Gram matrix 8 F^2 bytes each, of rows
    those of the rows.
    """
    tensors = {}
    for name, fit in fits.items():
        for side, statistic in zip(_SIDES, fit, strict=True):
            for key, array in statistic.state().items():
                if array.dtype.kind == "U":  # the name of a type
                    array = torch.tensor(list(str(array).encode()), dtype=torch.uint8).numpy()
                tensors[f"{name}/{side}/{key}"] = torch.from_numpy(array).contiguous()
    write_tensors(folder / STATISTICS_FILE, tensors)


def read_fits(folder: Path, name: str, scratch: Scratch) -> Fits:
    """The statistics of a group of training and of held-out windows, as they were written."""
    states: dict[str, State] = {side: {} for side in _SIDES}
    with safe_open(folder / STATISTICS_FILE, framework="np") as handle:
        for tensor in handle.keys():  # noqa: SIM118 - it is no dict
            group, side, key = tensor.split("/")
            if group == name:
                states[side][key] = handle.get_tensor(tensor)
    for state in states.values():
        if "dtype" in state:
            state["dtype"] = bytes(state["dtype"].tolist()).decode()  # type: ignore[assignment]
    training, held_out = (restored(states[side], scratch).finished() for side in _SIDES)
    return training, held_out
