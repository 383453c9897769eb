"""Layers of different sizes, as transformers can hold them: `per_layer_config`, and a small class
that builds layers from it.

Stock model classes ignore `per_layer_config` (transformers 5.23); the class goes with the exported
folder as remote code.
"""

import logging
from collections.abc import Mapping, Sequence
from string import Template

from rayprune.workers.model.config_patch import kept_heads, patched_config
from rayprune.workers.model.families import family_of, unit_groups

MODULE = "modeling_per_layer"
CLASS = "PerLayerForCausalLM"
AUTO_MAP = {"AutoModelForCausalLM": f"{MODULE}.{CLASS}"}
"""What the config of such a folder says of code."""
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


def per_layer_config(
    config: Mapping[str, object], layers: Sequence[Mapping[str, int]], dtype: str
) -> dict[str, object]:
    """The config of a model whose layers keep different numbers of units; sizes of the whole stay
    those of the original.
    """
    groups = unit_groups(config)
    dense = {group.name: group.num_units for group in groups}
    result = patched_config(config, dense, "transformers", dtype)
    sizes = {index: layer_sizes(config, kept) for index, kept in enumerate(layers) if kept != dense}
    return result | {
        "per_layer_config": sizes,
        "allow_global_per_layer_attribute_access": True,
        "auto_map": AUTO_MAP,
    }


def layer_sizes(config: Mapping[str, object], kept: Mapping[str, int]) -> dict[str, object]:
    """What the config of one layer says of its sizes."""
    blocks = {"heads": "attention", "neurons": "mlp"}
    sizes: dict[str, object] = {}
    if kept["heads"]:
        sizes |= {
            "num_attention_heads": kept_heads(config, kept["heads"]),
            "num_key_value_heads": kept["heads"],
        }
    if kept["neurons"]:
        sizes |= {"intermediate_size": kept["neurons"]}
    skipped = [block for name, block in blocks.items() if not kept[name]]
    return sizes | ({"skip": skipped} if skipped else {})


def silence_warnings() -> None:
    """Keep transformers from warning of every size that is read from the config as a whole: the
    class above never relies on one.
    """
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(
        logging.ERROR
    )


def remote_code(config: Mapping[str, object]) -> str:
    """The class that loads such a model, a subclass of the stock one of its family."""
    return SOURCE.substitute(base=family_of(config).architecture, name=CLASS)
