"""T5's encoder alone, as sentence-t5 and image models have it: norms before the blocks, positions
that the first layer turns into a bias and hands on to all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Layer, Model
from rayprune.workers.model.families.encoder import Encoder
from rayprune.workers.model.families.parts import WEIGHT, Keys, Part

_ATTENTION, _FFN = "layer.0.SelfAttention", "layer.1.DenseReluDense"


def _variant(config: Config) -> Mapping[str, Any]:
    """With a gate the FFN has two matrices before its activation."""
    gated = str(config.raw.get("feed_forward_proj", "relu")).startswith("gated-")
    names = ("wi_0", "wi_1") if gated else ("wi",)
    return {"ffn": Part(_FFN, {f"{_FFN}.{name}": "1" for name in names}, f"{_FFN}.wo")}


@dataclass(frozen=True)
class _T5(Encoder):
    def check_class(self, config: Config) -> None:
        """Refuse all but the encoder by itself: a decoder would be left out.

        Raises:
            ModelError: it is another class.
        """
        if self._suffix(config) != "Model":
            remedy = (
                f"save the encoder alone: {self.architecture}.from_pretrained(FOLDER)"
                ".save_pretrained(ENCODER)"
            )
            raise config.wrong("architectures", f"[{self.architecture!r}]", remedy=remedy)

    def describe(self, config: Config) -> Model:
        """The model that a config says."""
        return replace(super().describe(config), auto_class="AutoModelForTextEncoding")

    def _layers(self, config: Config) -> tuple[Layer, ...]:
        """Every layer; the first with the table of positions."""
        first, *others = super()._layers(config)
        buckets = config.integer("relative_attention_num_buckets", 32)
        table = {
            f"{_ATTENTION}.relative_attention_bias.weight": (buckets, self.heads(config).heads)
        }
        return (replace(first, shapes={**first.shapes, **table}), *others)


FAMILY = _T5(
    "T5EncoderModel",
    keys=Keys(
        hidden="d_model",
        layers="num_layers",
        heads="num_heads",
        kv_heads=None,
        head_dim="d_kv",
        width="d_ff",
    ),
    head_size=64,
    attention=Part(
        _ATTENTION, {f"{_ATTENTION}.{name}": "h" for name in "qkv"}, f"{_ATTENTION}.o", returns=3
    ),
    norms=("layer.0.layer_norm", "layer.1.layer_norm"),
    norm_tensors=WEIGHT,
    biased=lambda config: (),
    scale=lambda config: 1.0,
    layer_returns=3,
    layers_at="encoder.block",
    backbone="",
    embedding="shared.weight",
    position_table=None,
    token_types="",
    outer_norms=(),
    last_norm="encoder.final_layer_norm",
    head="",
    predicts=(),
    recomputed=("encoder.embed_tokens.weight",),
    heads_stay="all layers share the positions of its first one, and would have to lose the same"
    " heads, so all heads have to stay; FFN neurons can go, and whole layers (budget.drop_layers)",
    first_stays="it alone holds the positions of all layers",
    hands_on=True,
    varies=_variant,
)
