"""GLM-4.5 and its kin: behind the first layers experts, whose choice a bias corrects, and a shared
one.
"""

from rayprune.workers.model.families.mixture import (
    Experts,
    Mixture,
    first_dense,
    grouped,
    several_shared,
)
from rayprune.workers.model.families.parts import QKV

FAMILY = Mixture(
    "Glm4MoeForCausalLM",
    groups=8,
    biased=lambda config: QKV if config.flag("attention_bias") else (),
    varies=lambda config: (
        {"head_norms": ("self_attn.q_norm", "self_attn.k_norm")}
        if config.flag("use_qk_norm")
        else {}
    ),
    experts=Experts(
        count=("num_local_experts", "n_routed_experts"),
        router=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        parts=grouped(1, 1, judged=2),
    ),
    shared=several_shared(1),
    dense=first_dense(1),
)
