"""Seed-OSS: Llama's layers with biases where queries, keys and values arise."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import QKV


def _biased(config: Config) -> tuple[str, ...]:
    given: tuple[str, ...] = QKV if config.flag("attention_bias", True) else ()
    given += ("self_attn.o_proj",) if config.flag("attention_out_bias") else ()
    return given + (("mlp.",) if config.flag("mlp_bias") else ())


FAMILY = Decoder("SeedOssForCausalLM", biased=_biased, groups=8, head_size=128)
