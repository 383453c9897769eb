"""How a pruned model is written: keys of its config that change, and names and values of its
tensors.

No torch at import: conversions of tensors are written with their own methods.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayprune.workers.model.description import Shape
from rayprune.workers.model.places import Places

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Sizes = dict[str, Shape]
Convert = Callable[[Tensors], dict[str, "Tensor"]]
Reshape = Callable[[Mapping[str, Shape]], Sizes]


@dataclass(frozen=True)
class Form:
    """A stock form that holds a pruned model. Names are those inside a layer, or outside in
    full.
    """

    changes: Mapping[str, object] = field(default_factory=dict)
    """Keys of the config that are added or differ."""
    dropped: tuple[str, ...] = ()
    """Keys of the original's config that the form does not have."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Keys that the form calls otherwise, those of `changes` too: the original's to the form's."""
    layers_at: str | None = None
    """What names of layers begin with; None: as in the original."""
    layer: Convert = dict
    """A pruned layer's tensors as they are written."""
    outer: Convert = dict
    """The tensors outside the layers as they are written."""
    layer_shapes: Reshape = dict
    """Shapes of what `layer` gives, from those of what it is given."""
    outer_shapes: Reshape = dict
    """Shapes of what `outer` gives."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Modules of a layer whose names differ: the original's to the form's."""
    places: Places = field(default_factory=dict)
    """Where a layer's tensors lie in the file that do not lie there by their names."""

    def module(self, name: str) -> str:
        """The form's name of a module."""
        return self.modules.get(name, name)


AS_IT_IS = Form()
"""The original's own form."""
