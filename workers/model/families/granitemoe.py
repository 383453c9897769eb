"""Granite MoE (IBM): packed experts; blocks are added to the stream times a multiplier."""

from rayprune.workers.model.families.decoder import biased_by
from rayprune.workers.model.families.mixture import Experts, Mixture, packed

_AT = "block_sparse_moe"
FAMILY = Mixture(
    "GraniteMoeForCausalLM",
    biased=biased_by(attention_bias="self_attn."),
    scale=lambda config: config.number("residual_multiplier", 1.0),
    experts=Experts(
        count=("num_local_experts",),
        width="intermediate_size",
        at=f"{_AT}.experts",
        router=(f"{_AT}.router.weight",),
        places=packed(
            f"{_AT}.experts",
            (f"{_AT}.input_linear.weight", f"{_AT}.output_linear.weight"),
            others={f"{_AT}.router.weight": f"{_AT}.router.layer.weight"},
        ),
    ),
)
