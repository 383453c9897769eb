"""A small class that builds a model whose layers have sizes of their own.

Stock model classes ignore `per_layer_config` (transformers 5.23); the class goes with the exported
folder as remote code. Where a config class gives the head size no key, tensors are resized instead.
"""

from collections.abc import Sequence
from pprint import pformat
from string import Template

from rayprune.workers.model.description import Group, RemoteCode

MODULE = "modeling_per_layer"
CLASS = "PerLayerForCausalLM"
SOURCE = Template('''\
"""A $base whose layers have sizes of their own, from `per_layer_config`. Written by rayprune (Apache-2.0)."""

import torch
from torch import nn
from transformers import $base


class Absent(nn.Module):
    """Stands for a block that is left out: it adds nothing."""

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states, *args, **kwargs):
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.as_tuple else nothing


class $name($base):
    """Every layer is built from its own config; for the cache, layers with attention are numbered through, each type by itself."""

    def __init__(self, config):
        super().__init__(config)
        types = getattr(config, "layer_types", None) or [None] * len(self.model.layers)
        slots = {kind: iter([i for i, other in enumerate(types) if other == kind]) for kind in types}
        for index, layer in enumerate(self.model.layers):
            own = config.per_layer_config[index]
            self.model.layers[index] = layer = type(layer)(own, index)
            if "attention" in own.skip:
                layer.self_attn = Absent(as_tuple=True)
            else:
                layer.self_attn.layer_idx = next(slots[types[index]])
            if "mlp" in own.skip:
                layer.mlp = Absent(as_tuple=False)
''')


def sized_layers(base: str) -> RemoteCode:
    """The class for models of a stock class."""
    return RemoteCode(MODULE, CLASS, SOURCE.substitute(base=base, name=CLASS))


RESIZED = Template('''\
"""A $base whose layers have sizes of their own, from `units_per_layer`. Written by rayprune (Apache-2.0)."""

import torch
from torch import nn
from transformers import $base

AXES = $axes
"""Tensor of a layer, the axis along which units of a group lie, entries of one unit."""


class $name($base):
    """Built as it was, then every tensor that lost units is made anew, as large as its layer's units need."""

    def __init__(self, config):
        super().__init__(config)
        for layer, units in zip(self.$layers, config.units_per_layer):
            for tensor, group, axis, each in AXES:
                module, _, leaf = tensor.rpartition(".")
                owner = layer.get_submodule(module)
                shape = list(getattr(owner, leaf).shape)
                shape[axis] = units[group] * each
                setattr(owner, leaf, nn.Parameter(torch.empty(shape)))
''')


def resized_layers(base: str, suffix: str, layers_at: str, groups: Sequence[Group]) -> RemoteCode:
    """The class for models of a stock class that ends so: what lies along the axes of the groups is
    resized.
    """
    each: dict[tuple[str, str, int], int] = {}
    for group in groups:
        for axis in group.all_axes:
            key = (axis.tensor, group.name, axis.dim)
            each[key] = each.get(key, 0) + axis.per_unit
    axes = pformat([(*key, rows) for key, rows in each.items()], width=120)
    name = f"PerLayer{suffix}"
    text = RESIZED.substitute(base=base, name=name, layers=layers_at, axes=axes)
    return RemoteCode(MODULE, name, text)
