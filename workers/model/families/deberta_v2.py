"""DeBERTa V2 and V3: BERT whose attention compares contents with relative positions too."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Shape, Shapes
from rayprune.workers.model.families.encoder import ATTENTION, Encoder

_QKV = ("query_proj", "key_proj", "value_proj")


def _compared(config: Config) -> str:
    """What is compared with positions: of `c2p` and `p2c` those that the config names."""
    return str(config.raw.get("pos_att_type") or "").lower()


def _refused(config: Config) -> str | None:
    if config.raw.get("conv_kernel_size"):
        return "conv_kernel_size is not supported: the convolution stands between two layers"
    if config.raw.get("legacy") is False:
        return "legacy: false is not supported: its head reads the embeddings; prune the bare model"
    if config.raw.get("embedding_size", config.integer("hidden_size")) != config.raw["hidden_size"]:
        return "an embedding_size other than hidden_size is not supported"
    if config.raw.get("attention_head_size") is not None:
        return "attention_head_size is not supported"
    return None


def _variant(config: Config) -> Mapping[str, Any]:
    """Matrices for positions, tables that a config may do without."""
    names = list(_QKV)
    if config.flag("relative_attention") and not config.flag("share_att_key"):
        pairs = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
        names += [name for kind, name in pairs.items() if kind in _compared(config)]
    found: dict[str, Any] = {
        "attention": replace(ATTENTION, producers={f"attention.self.{name}": "h" for name in names})
    }
    if not config.flag("position_biased_input", True):
        found["position_table"] = None
    if not config.raw.get("type_vocab_size"):
        found["token_types"] = ""
    return found


@dataclass(frozen=True)
class _Deberta(Encoder):
    def _outer(self, config: Config, hidden: int, vocabulary: int, tied: bool) -> Shapes:
        """With the table of relative positions and its norm."""
        shapes: dict[str, Shape] = dict(super()._outer(config, hidden, vocabulary, tied))
        if not config.flag("relative_attention"):
            return shapes
        start = self.layers_at.removesuffix("layer")
        buckets = config.raw.get("position_buckets")
        positions = buckets if isinstance(buckets, int) and buckets > 0 else self._farthest(config)
        shapes[f"{start}rel_embeddings.weight"] = (2 * positions, hidden)
        if "layer_norm" in str(config.raw.get("norm_rel_ebd", "none")).lower():
            shapes |= self._norm(f"{start}LayerNorm", hidden)
        return shapes

    @staticmethod
    def _farthest(config: Config) -> int:
        given = config.raw.get("max_relative_positions")
        return (
            given
            if isinstance(given, int) and given > 0
            else config.integer("max_position_embeddings")
        )


FAMILY = _Deberta(
    "DebertaV2Model",
    layer_returns=2,
    backbone="deberta",
    heads_stay="its attention counts heads outside its matrices, so all heads have to stay; FFN"
    " neurons can go, and whole layers (budget.drop_layers)",
    check=_refused,
    varies=_variant,
)
