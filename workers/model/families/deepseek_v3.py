"""DeepSeek-V3 and R1: latent attention; behind the first layers experts in groups, whose choice a
bias corrects, and shared ones.
"""

from rayprune.workers.model.families.latent import LATENT_KEYS, Latent
from rayprune.workers.model.families.mixture import Experts, first_dense, grouped, several_shared

FAMILY = Latent(
    "DeepseekV3ForCausalLM",
    keys=LATENT_KEYS,
    query_rank=1536,
    experts=Experts(
        count=("num_local_experts", "n_routed_experts"),
        router=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        parts=grouped(8, 4, judged=2),
    ),
    shared=several_shared(1),
    dense=first_dense(3),
)
