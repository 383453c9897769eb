"""The exported config, as a table."""

from importlib.metadata import version
from typing import Any

import pytest
from transformers import AutoConfig

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Shape
from rayprune.workers.model.families import family_named, family_of, model_types
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.encoder import Encoder
from rayprune.workers.model.families.mixture import Mixture
from rayprune.workers.model.rewrite import form_of, of_layers, written
from tests.models import raw_config

UNKNOWN: dict[str, Any] = {
    "rope_theta": 5e5,
    "unknown": {"kept": [1]},
    "auto_map": {"AutoModel": "evil.py"},
    "_name_or_path": "/home/someone",
}
BASE: dict[str, Any] = UNKNOWN | {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    return (
        {"model_type": model_type, "architectures": [f"{model_type.title()}ForCausalLM"]}
        | BASE
        | changes
    )


def patched_config(
    original: dict[str, Any], kept: dict[str, int], target: str, dtype: str
) -> dict[str, Any]:
    """The config of a model of 3 layers that all keep so many units."""
    return written(Config(original), range(3), [kept] * 3, target, dtype).config


def added_tensors(original: dict[str, Any], kept: dict[str, int], target: str) -> set[str]:
    """Tensors of a layer that the form has and the original has not."""
    layer = family_of(Config(original)).describe(Config(original)).layers[0]
    shapes: dict[str, Shape] = layer.cut_shapes(kept)
    return form_of(Config(original), kept, target).layer_shapes(shapes).keys() - shapes.keys()


def written_out(given: dict[str, Any]) -> dict[str, Any]:
    """A config without what no folder of ours says."""
    return {key: value for key, value in given.items() if key not in ("auto_map", "_name_or_path")}


@pytest.mark.parametrize("model_type", model_types())
@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_unpruned_heads_change_no_model_type(model_type: str, target: str) -> None:
    # that an encoder is of is known by its class
    own = isinstance(family_named(model_type), Encoder)
    classes = {} if own else {"architectures": ["Something"]}
    family = family_named(model_type)
    whole = dict[str, Any]()
    if isinstance(family, Backbone):
        # what is said of the text model in a config of its own, and of the whole in another
        whole = UNKNOWN | {"architectures": [family.architecture]}
    original = raw_config(model_type, **UNKNOWN, **classes) | whole
    config = Config(original)
    model = family_of(config).describe(config)
    kept = model.units | {"neurons": 24}
    for group in model.groups:
        if group.times:
            kept[group.name] = group.times[1] * kept[group.times[0]]
    neurons = next(group for group in model.groups if group.name == "neurons")
    if neurons.fixed:
        with pytest.raises(SpecError, match=neurons.fixed):
            patched_config(original, kept, target, "auto")
        return
    patched = patched_config(original, kept, target, "auto")
    width = family.experts.width if isinstance(family, Mixture) else "intermediate_size"
    narrower = raw_config(model_type, **UNKNOWN, **classes, **{width: 24}) | whole
    if isinstance(family, Backbone):
        narrower["text_config"] = written_out(narrower["text_config"])
    assert patched == written_out(narrower)
    assert not added_tensors(original, kept, target)
    assert "auto_map" in original


def test_head_sizes_are_written_out() -> None:
    """Fewer heads would change what the class takes for it."""
    patched = patched_config(config("llama"), {"heads": 4, "neurons": 20}, "transformers", "auto")
    assert patched["head_dim"] == 4


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 8}),
        (
            "smollm3",
            {"no_rope_layers": [1, 0, 0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 8},
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": None}),
        ("qwen3", {"use_sliding_window": False, "max_window_layers": 3}),
        *((name, {}) for name in ("gemma3_text", "cohere2", "olmo3", "exaone4", "ministral")),
        ("gemma3_text", {"sliding_window_pattern": 2}),
        ("cohere2", {"sliding_window_pattern": 3}),
        ("exaone4", {"sliding_window_pattern": 2}),
        ("llama4_text", {}),
        ("llama4_text", {"no_rope_layers": [], "interleave_moe_layer_step": 2}),
        ("llama4_text", {"no_rope_layers": [1, 0, 0, 1, 1, 0], "moe_layers": [2, 4, 5]}),
        ("llama4_text", {"attention_chunk_size": None, "no_rope_layer_interval": 3}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 3]], "num_layers": 6}),
        ("gpt_neo", {"attention_types": [[["local"], 2], [["global"], 4]], "num_layers": 6}),
    ],
)
def test_layers_that_stay_keep_their_kind(model_type: str, changes: dict[str, Any]) -> None:
    stay = [0, 2, 3, 5]
    count = {"num_layers": 6} if "num_layers" in changes else {"num_hidden_layers": 6}
    original = {"model_type": model_type} | count | changes
    dense, pruned = (
        AutoConfig.for_model(**settings)
        for settings in (original, dict(of_layers(Config(original), stay).raw))
    )
    assert pruned.num_hidden_layers == 4
    for key in ("layer_types", "no_rope_layers", "attention_layers"):
        expected = getattr(dense, key, None)
        assert getattr(pruned, key, None) == (expected and [expected[layer] for layer in stay])
    if experts := getattr(dense, "moe_layers", None):
        assert pruned.moe_layers == [stay.index(layer) for layer in experts if layer in stay]


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": True,
    "mlp_bias": False,
    "sliding_window": None,
}
GRANITE = {
    "model_type": "granite",
    "architectures": ["GraniteForCausalLM"],
    "attention_multiplier": 0.5,  # one over the root of the head size
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "transformers_version": version("transformers"),
}
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": None,
    "transformers_version": version("transformers"),
}


@pytest.mark.parametrize(
    ("original", "kept", "target", "changes"),
    [
        (config("llama"), 2, "transformers", {}),
        (config("llama"), 3, "transformers", MISTRAL),
        (config("llama"), 3, "vllm", MISTRAL),
        (config("llama", head_dim=16), 3, "transformers", MISTRAL),
        (config("llama", attention_bias=True), 2, "transformers", {}),
        (config("llama", attention_bias=True), 3, "transformers", GRANITE),
        (config("llama", mlp_bias=True, head_dim=4), 3, "vllm", GRANITE),
        (config("mistral"), 3, "transformers", {}),
        (config("mistral", sliding_window=4096), 3, "vllm", {}),
        (config("qwen2"), 3, "transformers", {}),
        (config("qwen2"), 2, "vllm", LLAMA),
        (config("qwen2", use_sliding_window=True), 2, "transformers", {}),
        (config("qwen3"), 3, "vllm", {}),
        (config("gemma"), 3, "transformers", {}),
        (config("gemma2"), 2, "transformers", {}),
        (config("smollm3"), 3, "transformers", {}),
    ],
)
def test_pruned_heads(
    original: dict[str, Any], kept: int, target: str, changes: dict[str, Any]
) -> None:
    patched = patched_config(original, {"heads": kept, "neurons": 48}, target, "auto")
    expected = {
        key: value for key, value in original.items() if key not in ("auto_map", "_name_or_path")
    }
    sizes = {
        "num_attention_heads": 2 * kept,
        "num_key_value_heads": kept,
        "head_dim": original.get(
            "head_dim", {"qwen3": 128, "gemma": 256, "gemma2": 256}.get(original["model_type"], 4)
        ),
    }
    assert patched == expected | sizes | changes
    biases = {"self_attn.o_proj.bias"} if changes is LLAMA else set()
    assert added_tensors(original, {"heads": kept, "neurons": 48}, target) == biases


@pytest.mark.parametrize(
    ("original", "kept", "target", "message"),
    [
        (
            config("gemma2"),
            3,
            "transformers",
            "gemma2 cannot be written with 6 heads.*hidden_size to be a multiple of the heads",
        ),
        (
            config(
                "phi3",
                rope_scaling={"type": "longrope", "short_factor": [1, 1], "long_factor": [2, 2]},
            ),
            2,
            "transformers",
            "phi3 with longrope cannot be written with 4 heads.*factors for hidden_size / heads",
        ),
        (
            config("qwen2", use_sliding_window=True),
            2,
            "vllm",
            "qwen2 with a sliding window cannot be written for vLLM",
        ),
        (
            config("qwen2"),
            3,
            "vllm",
            (
                "qwen2 with 6 heads cannot be written for vLLM.*hidden_size to be a multiple of the"
                " heads"
            ),
        ),
    ],
)
def test_head_counts_no_class_accepts(
    original: dict[str, Any], kept: int, target: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        patched_config(original, {"heads": kept, "neurons": 48}, target, "auto")


@pytest.mark.parametrize(
    ("keys", "dtype", "expected"),
    [
        ({"torch_dtype": "float32"}, "auto", {"torch_dtype": "float32"}),
        ({"torch_dtype": "float32"}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, "float16", {"dtype": "float16"}),
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            "bfloat16",
            {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        ),
        ({}, "bfloat16", {"dtype": "bfloat16"}),
        ({}, "auto", {}),
    ],
)
def test_type_on_disk(keys: dict[str, str], dtype: str, expected: dict[str, str]) -> None:
    patched = patched_config(
        config("llama", **keys), {"heads": 4, "neurons": 8}, "transformers", dtype
    )
    assert {key: patched[key] for key in ("dtype", "torch_dtype") if key in patched} == expected


@pytest.mark.parametrize(
    ("heads", "groups", "kept", "expected"),
    [(8, 4, 3, 6), (8, 8, 3, 3), (8, 1, 1, 8), (8, None, 5, 5)],
)
def test_kept_query_heads(heads: int, groups: int | None, kept: int, expected: int) -> None:
    original = config("mistral", num_attention_heads=heads, num_key_value_heads=groups)
    patched = patched_config(original, {"heads": kept, "neurons": 48}, "transformers", "auto")
    assert patched["num_attention_heads"] == expected
