"""GLM-4 (0414): GLM with norms before and behind every block."""

from dataclasses import replace

from rayprune.workers.model.families import glm

FAMILY = replace(
    glm.FAMILY,
    architecture="Glm4ForCausalLM",
    norms=(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    scale=lambda config: None,
)
