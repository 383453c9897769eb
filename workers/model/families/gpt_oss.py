"""gpt-oss: experts packed with biases, sinks in the attention, windows in every other layer.

Published in MXFP4, which is refused: it is saved in a floating-point type first.
"""

from dataclasses import replace

from rayprune.workers.model.families.decoder import slides_but
from rayprune.workers.model.families.mixture import Experts, Mixture, packed
from rayprune.workers.model.families.parts import ATTENTION

FAMILY = Mixture(
    "GptOssForCausalLM",
    attention=replace(ATTENTION, follows={"self_attn.sinks": ("n",)}),
    groups=8,
    head_size=64,
    biased=lambda config: ("self_attn.",) if config.flag("attention_bias", True) else (),
    values_of_layer=slides_but(2, key=None),
    experts=Experts(
        width="intermediate_size",
        router=("mlp.router.weight", "mlp.router.bias"),
        biased=True,
        places=packed(
            "mlp.experts",
            ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            interleaved=True,
            transposed=True,
            biases=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
        ),
    ),
)
