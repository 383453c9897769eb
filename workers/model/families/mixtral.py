"""Mixtral: Mistral's layers with experts."""

from rayprune.workers.model.families.mixture import Experts, Mixture, renamed

_DISK = "block_sparse_moe"
FAMILY = Mixture(
    "MixtralForCausalLM",
    groups=8,
    experts=Experts(
        width="intermediate_size",
        places=renamed(
            "mlp.experts",
            ("w1", "w3", "w2"),
            f"{_DISK}.experts",
            {"mlp.gate.weight": f"{_DISK}.gate.weight"},
        ),
    ),
)
