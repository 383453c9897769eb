"""StableLM: blocks one after the other, or beside each other behind one norm."""

from collections.abc import Mapping
from typing import Any

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import QKV, WITH_BIAS, Keys


def _variant(config: Config) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    if config.flag("use_parallel_residual"):
        found["norms"] = ("input_layernorm",)
    if config.flag("qk_layernorm"):
        heads = config.integer("num_attention_heads")
        count = {"q": heads, "k": config.integer("num_key_value_heads", heads)}
        found["head_norms"] = tuple(
            f"self_attn.{name}_layernorm.norms.{head}"
            for name in count
            for head in range(count[name])
        )
    return found


FAMILY = Decoder(
    "StableLmForCausalLM",
    groups=32,
    keys=Keys(head_dim=None),
    norm_tensors=WITH_BIAS,
    biased=lambda config: QKV if config.flag("use_qkv_bias") else (),
    heads_stay="its class takes the head size from hidden_size and num_attention_heads, so all"
    " heads have to stay",
    sized_alike="StableLM's layers cannot be built with sizes of their own yet",
    varies=_variant,
)
