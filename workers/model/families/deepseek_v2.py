"""DeepSeek-V2 and V2-Lite: latent attention; behind the first layers experts and shared ones."""

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.decoder import divisors_only
from rayprune.workers.model.families.latent import LATENT_KEYS, Latent
from rayprune.workers.model.families.mixture import (
    Experts,
    Parts,
    first_dense,
    grouped,
    several_shared,
)

_WAYS = ("greedy", "group_limited_greedy")


def _parts(config: Config) -> Parts:
    limited = config.raw.get("topk_method", "greedy") == "group_limited_greedy"
    return grouped(1, 1)(config) if limited else Parts()


def _refused(config: Config) -> str | None:
    if config.raw.get("topk_method", "greedy") not in _WAYS:
        return f"topk_method must be one of {', '.join(_WAYS)}; no other one is computed"
    if config.flag("mlp_bias"):
        return "mlp_bias is not supported: its experts have none"
    return None


FAMILY = Latent(
    "DeepseekV2ForCausalLM",
    keys=LATENT_KEYS,
    query_rank=1536,
    fewer_heads=divisors_only,
    check=_refused,
    experts=Experts(count=("num_experts", "n_routed_experts"), parts=_parts),
    shared=several_shared(2),
    dense=first_dense(0),
)
