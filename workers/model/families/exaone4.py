"""EXAONE 4: norms behind the blocks and over each head; three layers with a window, one without."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import Decoder, slides_but
from rayprune.workers.model.families.parts import NORMS_BEHIND


def _kind(config: Config, layer: int) -> dict[str, object]:
    if config.raw.get("sliding_window", 4096) is None:
        return {"layer_types": "full_attention"}
    return slides_but(4)(config, layer)


FAMILY = Decoder(
    "Exaone4ForCausalLM",
    groups=32,
    norms=NORMS_BEHIND,
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    scale=lambda config: None,
    values_of_layer=_kind,
)
