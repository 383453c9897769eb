"""What other engines leave out of a layer without a block, where a folder for transformers keeps
the norm in front of it. No torch.
"""

from rayprune.workers.model.config import Config

_LEFT_OUT = {
    "attention": ("self_attn.", "input_layernorm."),
    "mlp": ("mlp.", "post_attention_layernorm."),
}


def absent_tensors(config: Config) -> tuple[str, ...]:
    """What the names of these tensors begin with, of all layers of a Llama's kind."""
    return tuple(
        f"model.layers.{layer}.{start}"
        for layer in range(config.integer("num_hidden_layers"))
        for block in config.of_layer(layer).skipped
        for start in _LEFT_OUT[block]
    )
