"""Where tensors lie in the files whose layout is not that of the description: under other names, or
packed into one tensor for all experts.

The description names a matrix (out, in) of every expert: `mlp.experts.3.up_proj.weight`. No torch
at import: views are made with the tensors' own methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in a tensor of a file, or in part of one."""

    name: str
    """The tensor's name, inside the layer."""
    expert: int | None = None
    """The entry of its first axis; None: all of it."""
    block: int = 0
    """Which of its blocks of outputs (gate, up)."""
    blocks: int = 1
    """How many blocks there are."""
    interleaved: bool = False
    """Whether outputs of the blocks alternate, where else one block is behind the other."""
    transposed: bool = False
    """Whether it is (in, out)."""

    def of(self, stored: "Tensor") -> "Tensor":
        """The part of a stored tensor that is meant: a view."""
        if self.expert is None:
            return stored
        part = stored[self.expert].T if self.transposed else stored[self.expert]
        if self.interleaved:
            return part[self.block :: self.blocks]
        length = len(part) // self.blocks
        return part[self.block * length : (self.block + 1) * length]

    def stored_shape(self, shape: _Shape, experts: int) -> _Shape:
        """The shape of the stored tensor, of a part of which this is the shape."""
        if self.expert is None:
            return shape
        out, *inputs = shape
        whole = (out * self.blocks, *inputs)
        return (experts, *(whole[::-1] if self.transposed else whole))


Places = Mapping[str, Place]


def stored_shapes(shapes: Mapping[str, _Shape], places: Places) -> dict[str, _Shape]:
    """Shapes of the tensors in a file, from those of the description."""
    experts = 1 + max((place.expert or 0 for place in places.values()), default=0)
    found = {}
    for name, shape in shapes.items():
        place = places.get(name, Place(name))
        found[place.name] = place.stored_shape(shape, experts)
    return found


def as_stored(tensors: Mapping[str, "Tensor"], places: Places) -> dict[str, "Tensor"]:
    """Tensors as they lie in a file, from those of the description."""
    shapes = stored_shapes({name: tuple(t.shape) for name, t in tensors.items()}, places)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = places.get(name, Place(name))
        if place.expert is None:
            found[place.name] = tensor
            continue
        if place.name not in found:
            found[place.name] = tensor.new_empty(shapes[place.name])
        place.of(found[place.name]).copy_(tensor)
    return found
