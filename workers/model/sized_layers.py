"""A small class that builds a model whose layers have sizes of their own, from `per_layer_config`.

Stock model classes ignore `per_layer_config` (transformers 5.23); the class goes with the exported
folder as remote code.
"""

from string import Template

from rayprune.workers.model.description import RemoteCode

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
