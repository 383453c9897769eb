"""Phi-3: queries, keys and values in one matrix, gate and up in another."""

from collections.abc import Mapping

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import PACKED_FFN, Part
from rayprune.workers.model.form import Form


def _unless_scaled(family: Decoder, config: Config, heads: int, target: str) -> Form:
    """Any number, but for longrope (the 128k ones): there the config class wants as many factors as
    are in half of hidden size / heads, and takes no `head_dim`.
    """
    del target
    for key in ("rope_parameters", "rope_scaling"):
        given = config.raw.get(key)
        factors = isinstance(given, Mapping) and given.get("short_factor")
        if factors and family.hidden(config) // heads != family.heads(config).size:
            raise SpecError(
                f"{config.model_type} with longrope cannot be written with {heads} heads: its"
                " config wants factors for hidden_size / heads; leave out budget.kv_groups"
            )
    return Form()


FAMILY = Decoder(
    "Phi3ForCausalLM",
    attention=Part("self_attn", {"self_attn.qkv_proj": "q h h"}, "self_attn.o_proj", returns=2),
    ffn=PACKED_FFN,
    fewer_heads=_unless_scaled,
)
