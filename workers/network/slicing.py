"""The one module that slices weights.

Letters: D hidden, K kept columns of the consumer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from rayprune.workers.model.families import UnitGroup
from rayprune.workers.numerics.linalg import unit_rows


class CutArrays(TypedDict):
    """A `Cut` on its way from worker to worker."""

    group: str
    units: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Cut:
    """The decision for one coupled group of one layer.

    `units`: kept units, ascending; `weight_DK`: the consumer's corrected weight, rounded to its
    type on disk; of no units, nothing.
    """

    group: str
    units: Tensor
    weight_DK: Tensor

    def arrays(self) -> CutArrays:
        """As it travels between workers: numpy has no bfloat16, and fp32 holds every 16-bit type
        exactly.
        """
        dtype = torch.promote_types(self.weight_DK.dtype, torch.float32)
        return {
            "group": self.group,
            "units": self.units.numpy(),
            "weight": self.weight_DK.to("cpu", dtype).numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: CutArrays) -> "Cut":
        """Rebuild what `arrays` wrote, in memory of its own."""
        return cls(arrays["group"], torch.tensor(arrays["units"]), torch.tensor(arrays["weight"]))


def slice_layer(
    tensors: Mapping[str, Tensor], groups: Iterable[UnitGroup], cuts: Mapping[str, Cut]
) -> dict[str, Tensor]:
    """One layer's tensors without the pruned units; tensors no cut touches pass through.

    Producers lose rows (and bias entries), the consumer gets the corrected weight, in the cut's
    type, and keeps its bias. A block of which no unit stays loses all its tensors. Names are those
    inside the layer, weights (out, in).
    """
    result = dict(tensors)
    for group in groups:
        if group.name not in cuts:
            continue
        cut = cuts[group.name]
        if len(cut.units) == 0:
            result = {name: tensor for name, tensor in result.items() if not group.holds(name)}
            continue
        for producer in group.producers:
            rows = unit_rows(cut.units, producer.rows)
            for name in (f"{producer.module}.weight", f"{producer.module}.bias"):
                if name in result:
                    result[name] = result[name][rows]
        result[f"{group.consumer}.weight"] = cut.weight_DK
    return {name: tensor.contiguous() for name, tensor in result.items()}


def pad_layer(
    sliced: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    groups: Iterable[UnitGroup],
    widths: Mapping[str, int],
) -> dict[str, Tensor]:
    """A sliced layer with units of zeros behind its own, up to so many of each group: it computes
    the same.

    `dense` holds the layer's tensors before they were sliced.
    """
    lengths: dict[str, tuple[int, int]] = {}
    for group in groups:
        lengths |= {
            f"{p.module}.{kind}": (0, p.rows * widths[group.name])
            for p in group.producers
            for kind in ("weight", "bias")
        }
        lengths[f"{group.consumer}.weight"] = (1, group.columns * widths[group.name])
    padded = {}
    for name, tensor in dense.items():
        shape = list(tensor.shape)
        if name in lengths:
            shape[lengths[name][0]] = lengths[name][1]
        padded[name] = torch.zeros(shape, dtype=sliced.get(name, tensor).dtype)
        if name in sliced:
            padded[name][tuple(map(slice, sliced[name].shape))] = sliced[name]
    return padded
