"""Phi-3.5-MoE: norms with biases, a router that samples two experts one after the other."""

from rayprune.workers.model.families.decoder import biased_by
from rayprune.workers.model.families.mixture import Experts, Mixture, renamed
from rayprune.workers.model.families.parts import WITH_BIAS

_DISK = "block_sparse_moe"
FAMILY = Mixture(
    "PhimoeForCausalLM",
    groups=8,
    norm_tensors=WITH_BIAS,
    biased=biased_by(attention_bias="self_attn."),
    varies=lambda config: {"head_bias": "lm_head.bias"} if config.flag("lm_head_bias") else {},
    experts=Experts(
        count=("num_local_experts",),
        width="intermediate_size",
        router=("mlp.router.weight",),
        places=renamed(
            "mlp.experts",
            ("w1", "w3", "w2"),
            f"{_DISK}.experts",
            {"mlp.router.weight": f"{_DISK}.gate.weight"},
        ),
    ),
)
