"""ModernBERT: norms before the blocks, rotary positions, windows but for every third layer; the
first layer has no norm before its attention, since the embeddings have one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Layer
from rayprune.workers.model.families.decoder import biased_by
from rayprune.workers.model.families.encoder import Encoder
from rayprune.workers.model.families.parts import WEIGHT, WITH_BIAS, Part


def _kind(config: Config, layer: int) -> dict[str, object]:
    slides = layer % config.integer("global_attn_every_n_layers", 3) != 0
    return {"layer_types": "sliding_attention" if slides else "full_attention"}


def _variant(config: Config) -> Mapping[str, Any]:
    """Biases of the norms and of the head."""
    predicting = {"head.dense.weight": "DD", "head.norm.weight": "D"}
    biases = {
        "decoder.bias": ("V", config.flag("decoder_bias", True)),
        "head.dense.bias": ("D", config.flag("classifier_bias")),
        "head.norm.bias": ("D", config.flag("norm_bias")),
    }
    predicting |= {name: axes for name, (axes, given) in biases.items() if given}
    norms = WITH_BIAS if config.flag("norm_bias") else WEIGHT
    return {"norm_tensors": norms, "predicting": predicting}


@dataclass(frozen=True)
class _ModernBert(Encoder):
    def _layers(self, config: Config) -> tuple[Layer, ...]:
        """Every layer; the first without its first norm."""
        first, *others = super()._layers(config)
        lacks = f"{self.norms[0]}."
        shapes = {n: shape for n, shape in first.shapes.items() if not n.startswith(lacks)}
        return (replace(first, shapes=shapes), *others)


FAMILY = _ModernBert(
    "ModernBertModel",
    attention=Part("attn", {"attn.Wqkv": "h h h"}, "attn.Wo", returns=2),
    ffn=Part("mlp", {"mlp.Wi": "1 1"}, "mlp.Wo"),
    norms=("attn_norm", "mlp_norm"),
    biased=biased_by(attention_bias="attn.", mlp_bias="mlp."),
    scale=lambda config: 1.0,
    layers_at="layers",
    backbone="model",
    embedding="embeddings.tok_embeddings.weight",
    position_table=None,
    token_types="",
    outer_norms=("embeddings.norm",),
    last_norm="final_norm",
    head="decoder.weight",
    tied_bias="",
    values_of_layer=_kind,
    first_stays="it alone has no norm before its attention",
    varies=_variant,
)
