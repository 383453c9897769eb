"""What vLLM is told of a model whose layers differ: its class for DeciLM (Nemotron-NAS), which has
KV heads and FFN channels of its own for every layer, with the query heads alike. No torch.

Seen in vLLM 0.32: `model_executor/models/nemotron_nas.py`.
"""

from collections.abc import Mapping

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import RemoteCode

TYPES: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": False, "mlp_bias": False, "qkv_bias": True},
}
"""Keys that are added, by model type."""
_DROPPED = (
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "auto_map",
    "layer_types",
)
CODE = RemoteCode(
    "configuration_deci",
    "DeciLMConfig",
    '''\
"""A Llama whose layers have sizes of their own, as vLLM reads it. Written by rayprune (Apache-2.0)."""

from transformers import LlamaConfig


class Block(dict):
    """Sizes of a layer: keys are attributes too."""

    def __getattr__(self, name):
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """Llama's, with `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs or []]
''',
)


def deci_lm_of(config: Config) -> dict[str, object]:
    """The config that vLLM reads, of an exported folder's.

    Raises:
        SpecError: DeciLM does not hold it.
    """
    layers = [config.of_layer(layer) for layer in range(config.integer("num_hidden_layers"))]
    blocks = [_block(layer) for layer in layers]
    heads = {
        layer.integer("num_attention_heads") for layer in layers if "attention" not in layer.skipped
    }
    if why := _why_not(config, layers, heads):
        raise SpecError(
            f"export.target: vllm: {why}; set export.pad: true, or leave vllm out of export.target"
        )
    kept = {key: value for key, value in config.raw.items() if key not in _DROPPED}
    return {
        **kept,
        **TYPES[config.model_type],
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": CODE.auto_map("AutoConfig"),
        "num_attention_heads": heads.pop(),
        "head_dim": config.optional("head_dim")
        or config.integer("hidden_size") // config.integer("num_attention_heads"),
        "block_configs": blocks,
    }


def _why_not(config: Config, layers: list[Config], heads: set[int]) -> str | None:
    if config.model_type not in TYPES:
        return f"layers of different sizes of a {config.model_type} have no form there"
    if "attention" in layers[0].skipped:
        return "its first layer must have attention where layers differ"
    if len(heads) != 1:
        return (
            "where layers differ, all must have as many query heads (set budget.kv_groups to one"
            " number for all)"
        )
    if config.integer("hidden_size") % next(iter(heads)):
        return "where layers differ, hidden_size must be a multiple of the query heads"
    slides = config.flag("use_sliding_window") or config.model_type == "mistral"
    if slides and config.optional("sliding_window"):
        return "where layers differ, there is no sliding window"
    return None


def _block(layer: Config) -> dict[str, object]:
    heads = layer.integer("num_attention_heads")
    each = heads // layer.integer("num_key_value_heads", heads)
    attends, feeds = ("attention" not in layer.skipped, "mlp" not in layer.skipped)
    attention: dict[str, object] = {"no_op": not attends}
    attention |= {"n_heads_in_group": each} if attends else {}
    ffn: dict[str, object] = {"no_op": not feeds}
    ffn |= {"intermediate_size": layer.integer("intermediate_size")} if feeds else {}
    return {"attention": attention, "ffn": ffn}
