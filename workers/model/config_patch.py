"""The exported config: the original's text, patched, never re-saved (transformers would drop keys
older readers need). No torch.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from rayprune.specs.errors import SpecError
from rayprune.workers.model.families import FAMILIES, Family, config_int, family_of, unit_groups

PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists of configs with an entry for each layer; any other list may be as long by chance."""


def kept_heads(config: Mapping[str, object], kv_groups: int) -> int:
    """Query heads that stay with so many KV groups."""
    heads = config_int(config, "num_attention_heads")
    return heads // config_int(config, "num_key_value_heads", heads) * kv_groups


def patched_config(
    config: Mapping[str, object], kept: Mapping[str, int], target: str, dtype: str
) -> dict[str, object]:
    """The config of the pruned model.

    `kept` holds the units that stay per group: `heads` (KV groups) and `neurons` (FFN channels).

    Raises:
        SpecError: no stock class can hold these head counts.
    """
    result = {
        key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")
    }
    heads = kept_heads(config, kept["heads"])
    head_group = unit_groups(config)[0]
    result |= {
        "num_attention_heads": heads,
        "num_key_value_heads": kept["heads"],
        "head_dim": head_group.producers[1].rows,
        "intermediate_size": kept["neurons"],
    }
    if dtype != "auto":
        result |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {
            "dtype": dtype
        }
    if kept["heads"] != head_group.num_units:
        result |= _model_type_for(config, heads, target)
    return result


def config_of_layers(config: Mapping[str, object], layers: Sequence[int]) -> dict[str, object]:
    """The config of a model that keeps only these layers; lists with an entry for each layer are
    cut with them.

    Lists that the config class would work out from a layer's number are written, unless all entries
    are alike: numbers change.
    """
    count = config_int(config, "num_hidden_layers")
    if len(layers) == count:
        return dict(config)
    cut = {key: [values[layer] for layer in layers] for key, values in layer_lists(config).items()}
    return {**config, **cut, "num_hidden_layers": len(layers)}


def layer_lists(config: Mapping[str, object]) -> dict[str, list[object]]:
    """Lists of the config with an entry for each layer, and those that its class works out from a
    layer's number, unless all are alike.
    """
    count, family = (
        config_int(config, "num_hidden_layers"),
        FAMILIES.get(str(config.get("model_type")), Family("")),
    )
    patterns = [family.pattern(config, layer) for layer in range(count)]
    derived = {
        key: values
        for key in patterns[0]
        if len(set(values := [pattern[key] for pattern in patterns])) > 1
    }
    return derived | {
        key: value
        for key, value in config.items()
        if key in PER_LAYER and isinstance(value, list) and len(value) == count
    }


def needs_output_bias(config: Mapping[str, object], kept: Mapping[str, int], target: str) -> bool:
    """Whether the attention's output projection needs a zero bias that the original has not (a
    Qwen2 written as Llama).
    """
    written_as_llama = target == "vllm" and family_of(config).vllm_written_as == "llama"
    return (
        config.get("model_type") == "qwen2"
        and written_as_llama
        and kept["heads"] != unit_groups(config)[0].num_units
    )


def _model_type_for(config: Mapping[str, object], heads: int, target: str) -> dict[str, object]:
    """Keys that make a stock class accept this head count."""
    family, model_type = family_of(config), str(config["model_type"])
    uneven = config_int(config, "hidden_size") % heads != 0
    if target == "vllm" and family.vllm_written_as == "llama":
        if config.get("use_sliding_window"):
            raise SpecError(
                f"{model_type} with a sliding window cannot be written for vLLM with fewer heads:"
                " Llama has none"
            )
        if uneven:
            raise SpecError(
                f"{model_type} with {heads} heads cannot be written for vLLM: Llama wants"
                " hidden_size to be a multiple of the heads"
            )
        llama: dict[str, object] = {
            "model_type": "llama",
            "architectures": [FAMILIES["llama"].architecture],
            "attention_bias": True,
            "mlp_bias": False,
        }
        # Qwen's own stands there unused; a cache of Llama would heed it
        return llama | {"sliding_window": None}
    if not (uneven and family.heads_divide_hidden):
        return {}
    if (
        family.written_as == "mistral"
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
    ):
        mistral: dict[str, object] = {
            "model_type": "mistral",
            "architectures": [FAMILIES["mistral"].architecture],
            "sliding_window": None,
        }
        # of older ones the tokenizer is taken for a faulty one
        return mistral | {"transformers_version": version("transformers")}
    raise SpecError(
        f"{model_type} cannot be written with {heads} heads: its config wants hidden_size to be a"
        " multiple of the heads; set budget.kv_groups"
    )
