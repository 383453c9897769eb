"""Phi: attention and FFN beside each other behind one norm; everything has a bias, the head too."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import ATTENTION, WITH_BIAS, Part


def _refused(config: Config) -> str | None:
    if config.flag("qk_layernorm"):
        return "qk_layernorm: norms over heads of a fixed size are not supported for phi"
    return None


FAMILY = Decoder(
    "PhiForCausalLM",
    attention=Part("self_attn", ATTENTION.producers, "self_attn.dense", returns=2),
    ffn=Part("mlp", {"mlp.fc1": "1"}, "mlp.fc2"),
    norms=("input_layernorm",),
    norm_tensors=WITH_BIAS,
    biased=lambda config: ("self_attn.", "mlp."),
    last_norm="model.final_layernorm",
    head_bias="lm_head.bias",
    check=_refused,
)
