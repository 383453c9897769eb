"""OPT: learned positions, an FFN that is no module of its own and works on all tokens at once."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import ATTENTION, WITH_BIAS, Keys, Part


def _refused(config: Config) -> str | None:
    hidden = config.integer("hidden_size")
    if not config.flag("do_layer_norm_before", True) or config.flag("_remove_final_layer_norm"):
        return "do_layer_norm_before: false (OPT-350M) is not supported: there is no last norm"
    if config.integer("word_embed_proj_dim", hidden) != hidden:
        return "word_embed_proj_dim: embeddings of a size of their own are not supported for opt"
    return None


FAMILY = Decoder(
    "OPTForCausalLM",
    keys=Keys(kv_heads=None, head_dim=None, width="ffn_dim"),
    attention=Part("self_attn", ATTENTION.producers, "self_attn.out_proj", returns=2),
    ffn=Part("fc2", {"fc1": "1"}, "fc2", holds=("fc1.", "fc2."), flat=True),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("self_attn.", "fc") if config.flag("enable_bias", True) else (),
    layers_at="model.decoder.layers",
    backbone="model",
    embedding="model.decoder.embed_tokens.weight",
    position_table="model.decoder.embed_positions.weight",
    more_positions=2,
    last_norm="model.decoder.final_layer_norm",
    tied=True,
    heads_stay="its class takes the head size from hidden_size and num_attention_heads, so all"
    " heads have to stay",
    sized_alike="OPT's layers cannot be built with sizes of their own yet",
    check=_refused,
    varies=lambda config: (
        {} if config.flag("layer_norm_elementwise_affine", True) else {"norm_tensors": ()}
    ),
)
