"""StarCoder 2: a plain FFN, norms and matrices with biases."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import WITH_BIAS, Part


def _biased(config: Config) -> tuple[str, ...]:
    return ("self_attn.", "mlp.") if config.flag("use_bias", True) else ()


FAMILY = Decoder(
    "Starcoder2ForCausalLM",
    groups=2,
    ffn=Part("mlp", {"mlp.c_fc": "1"}, "mlp.c_proj"),
    norm_tensors=WITH_BIAS,
    biased=_biased,
    tied=True,
)
