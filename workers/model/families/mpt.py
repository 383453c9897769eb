"""MPT: ALiBi instead of positions, no biases, a residual added inside the FFN."""

from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import Keys, Part

FAMILY = Decoder(
    "MptForCausalLM",
    keys=Keys(
        hidden="d_model",
        layers="n_layers",
        heads="n_heads",
        kv_heads=None,
        head_dim=None,
        width=None,
        positions="max_seq_len",
    ),
    attention=Part("attn", {"attn.Wqkv": "h h h"}, "attn.out_proj", returns=2),
    ffn=Part("ffn.down_proj", {"ffn.up_proj": "1"}, "ffn.down_proj", holds=("ffn.",)),
    widths_of_hidden=4,
    norms=("norm_1", "norm_2"),
    layer_returns=2,
    layers_at="transformer.blocks",
    backbone="transformer",
    embedding="transformer.wte.weight",
    last_norm="transformer.norm_f",
    tied=True,
    heads_stay="its positions (ALiBi) follow the number of heads, so all heads have to stay",
    width_stays="its class makes every FFN four times as wide as d_model, so all channels have to"
    " stay; whole layers can go: budget.drop_layers",
    pads=False,
    sized_alike="MPT's layers cannot be built with sizes of their own yet",
)
