"""GPT-2: weights are (in, out), queries, keys and values are one matrix, positions are learned."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import GPT_KEYS, WITH_BIAS, Part


def _refused(config: Config) -> str | None:
    if config.flag("scale_attn_by_inverse_layer_idx"):
        return "scale_attn_by_inverse_layer_idx is not supported: it reads a layer's number"
    if config.flag("add_cross_attention"):
        return "add_cross_attention is not supported"
    return None


FAMILY = Decoder(
    "GPT2LMHeadModel",
    keys=GPT_KEYS,
    attention=Part("attn", {"attn.c_attn": "h h h"}, "attn.c_proj", returns=2),
    ffn=Part("mlp", {"mlp.c_fc": "1"}, "mlp.c_proj"),
    widths_of_hidden=4,
    norms=("ln_1", "ln_2"),
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("attn.", "mlp."),
    transposed=True,
    layers_at="transformer.h",
    backbone="transformer",
    embedding="transformer.wte.weight",
    position_table="transformer.wpe.weight",
    last_norm="transformer.ln_f",
    tied=True,
    pads=False,
    recomputed=(".attn.bias", ".attn.masked_bias"),
    heads_stay="its class takes the head size from n_embd and n_head, so all heads have to stay",
    sized_alike="GPT-2's layers cannot be built with sizes of their own yet",
    check=_refused,
)
