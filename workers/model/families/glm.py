"""GLM (GLM-4 9B as transformers has it): gate and up are one matrix; biases where values arise."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import PACKED_FFN, QKV


def biased(config: Config) -> tuple[str, ...]:
    """Queries, keys and values have biases unless the config says otherwise."""
    return QKV if config.flag("attention_bias", True) else ()


FAMILY = Decoder("GlmForCausalLM", ffn=PACKED_FFN, biased=biased, groups=2, head_size=128)
