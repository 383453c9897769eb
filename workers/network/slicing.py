"""The one module that slices weights.

Letters: D hidden, K kept columns of the consumer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from rayprune.workers.model.description import Axis, Group
from rayprune.workers.numerics.linalg import unit_rows


class CutArrays(TypedDict):
    """A `Cut` on its way from process to process."""

    group: str
    units: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class Cut:
    """The decision for one coupled group of one layer.

    `units`: kept units, ascending; `weight_DK`: the consumer's corrected weight, rounded to its
    type on disk; of no units, nothing. It stays where it was made until it leaves its process.
    """

    group: str
    units: Tensor
    weight_DK: Tensor

    def on(self, device: torch.device, dtype: torch.dtype) -> "Cut":
        """The same for passes on a device in a type."""
        return Cut(self.group, self.units.to(device), self.weight_DK.to(device, dtype))

    def __reduce__(self) -> tuple[Callable[[CutArrays], "Cut"], tuple[CutArrays]]:
        return Cut.from_arrays, (self.arrays(),)

    def arrays(self) -> CutArrays:
        """As it travels between processes: numpy has no bfloat16, and fp32 holds every 16-bit type
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
    tensors: Mapping[str, Tensor], groups: Iterable[Group], cuts: Mapping[str, Cut]
) -> dict[str, Tensor]:
    """One layer's tensors without the pruned units; tensors no cut touches pass through.

    What lies along an axis of a group loses the entries of its pruned units, the consumer gets the
    corrected weight, in the cut's type, and keeps its bias. A block of which no unit stays loses
    all its tensors. Experts that stay are numbered anew. Names are those inside the layer.
    """
    result = dict(tensors)
    for group in (group for group in groups if group.name in cuts):
        cut = cuts[group.name]
        if group.kind == "experts":
            continue  # behind the others, whose tensors have the numbers of the whole layer
        if len(cut.units) == 0:
            result = {n: tensor for n, tensor in result.items() if not group.block.holds(n)}
            continue
        result |= keep_units(result, group.axes, group.num_units, cut.units)
        weight = cut.weight_DK
        result[group.consumer.weight] = weight.T if group.consumer.transposed else weight
    for group in (group for group in groups if group.kind == "experts" and group.name in cuts):
        result = keep_experts(result, group, cuts[group.name].units.tolist())
    return {name: tensor.contiguous() for name, tensor in result.items()}


def keep_experts(
    tensors: Mapping[str, Tensor], group: Group, units: Sequence[int]
) -> dict[str, Tensor]:
    """A layer's tensors with these experts alone, numbered anew; the router chooses among them."""
    inside = f"{group.block.module}."
    places = {str(unit): place for place, unit in enumerate(units)}
    routers, found = {axis.tensor for axis in group.axes}, dict[str, Tensor]()
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix(inside).partition(".")
        if name in routers:
            found[name] = tensor.index_select(0, torch.tensor(units, device=tensor.device))
        elif not name.startswith(inside):
            found[name] = tensor
        elif number in places:
            found[f"{inside}{places[number]}.{rest}"] = tensor
    return found


def keep_units(
    tensors: Mapping[str, Tensor], axes: Iterable[Axis], num_units: int, units: Tensor
) -> dict[str, Tensor]:
    """The tensors that lie along these axes, without the entries of units that do not stay."""
    found = {}
    for name, its in _by_tensor(axes).items():
        if name in tensors:
            tensor, dim = tensors[name], its[0].dim
            stays = kept_entries(tensor.shape[dim], its, num_units, units)
            found[name] = tensor.index_select(dim, stays.to(tensor.device))
    return found


def kept_entries(length: int, axes: Sequence[Axis], num_units: int, units: Tensor) -> Tensor:
    """Indices along an axis of so many entries that stay, ascending, when these units do."""
    stays = torch.ones(length, dtype=torch.bool)
    for axis in axes:
        part = stays[axis.start : axis.start + num_units * axis.per_unit]
        part.fill_(False)
        part[unit_rows(units.cpu(), axis.per_unit)] = True
    return stays.nonzero().flatten()


def _by_tensor(axes: Iterable[Axis]) -> dict[str, list[Axis]]:
    found: dict[str, list[Axis]] = {}
    for axis in axes:
        found.setdefault(axis.tensor, []).append(axis)
    return found


def pad_layer(
    sliced: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    groups: Iterable[Group],
    kept: Mapping[str, int],
    widths: Mapping[str, int],
) -> dict[str, Tensor]:
    """A sliced layer with units of zeros behind its own, up to so many of each group: it computes
    the same.

    `dense` holds the layer's tensors before they were sliced, `kept` the units that stayed.
    """
    axes = {
        name: (group, parts)
        for group in groups
        for name, parts in _by_tensor(group.all_axes).items()
    }
    padded = {}
    for name, tensor in dense.items():
        given = sliced.get(name)
        dtype = tensor.dtype if given is None else given.dtype
        if name not in axes:
            # of an absent block: biases and norms that no unit goes with
            padded[name] = torch.zeros(tensor.shape, dtype=dtype) if given is None else given
            continue
        group, parts = axes[name]
        dim, units = parts[0].dim, widths[group.name]
        length = tensor.shape[dim] - (group.num_units - units) * sum(a.per_unit for a in parts)
        shape = [length if d == dim else size for d, size in enumerate(tensor.shape)]
        padded[name] = torch.zeros(shape, dtype=dtype)
        if given is not None:
            moved = [replace(a, start=_start(a, parts, group.num_units, units)) for a in parts]
            places = kept_entries(length, moved, units, torch.arange(kept[group.name]))
            padded[name].index_copy_(dim, places, given)
    return padded


def _start(axis: Axis, axes: Sequence[Axis], dense: int, units: int) -> int:
    """Where a block begins once each has so many units."""
    before = sum(other.per_unit for other in axes if other.start < axis.start)
    return axis.start - (dense - units) * before
