"""What llama.cpp is told of a model."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config
from rayprune.workers.model.ggml import ggml_of, llama3_factors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
}


def form(**changes: Any) -> Any:
    return ggml_of(Config(BASE | changes))


def test_sizes_of_layers_that_are_alike_stand_once() -> None:
    found = form(rope_theta=1e5)
    assert found.architecture == "llama"
    sizes = ("head_count", "head_count_kv", "feed_forward_length", "key_length", "rope_freq_base")
    assert [found.fields[name] for name in sizes] == [8, 4, 96, 16, 1e5]
    assert found.turned_heads("model.layers.2.self_attn.q_proj.weight") == 8
    assert found.turned_heads("model.layers.2.self_attn.k_proj.bias") == 4
    assert found.turned_heads("model.layers.2.self_attn.v_proj.weight") == 0
    assert form(model_type="qwen3").turned_heads("model.layers.2.self_attn.q_proj.weight") == 0


def test_sizes_of_layers_that_differ_stand_for_each() -> None:
    layers = {
        "0": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "1": {"skip": ["attention"], "intermediate_size": 32},
        "2": {"skip": ["mlp"]},
    }
    found = form(per_layer_config=layers)
    assert found.architecture == "deci"
    sizes = ("head_count", "head_count_kv", "feed_forward_length")
    assert [found.fields[name] for name in sizes] == [[4, 0, 8], [2, 0, 4], [96, 32, 0]]
    assert found.turned_heads("model.layers.0.self_attn.q_proj.weight") == 4


def test_positions_within_a_window_alone() -> None:
    assert form(model_type="mistral", sliding_window=128).fields["context_length"] == 128
    assert form(model_type="qwen2", sliding_window=128).fields["context_length"] == 512


@pytest.mark.parametrize("places", ["rope_parameters", "rope_scaling"])
def test_frequencies_of_llama_3_are_those_of_transformers(places: str) -> None:
    config = LlamaConfig(**BASE | {"hidden_size": 1024, "head_dim": 128, "rope_parameters": LLAMA3})
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
    plain = 1.0 / 5e5 ** (torch.arange(0, 128, 2).double() / 128)
    factors = torch.tensor(llama3_factors(LLAMA3, 5e5, 128)).double()
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
    given = form(**{places: LLAMA3, "rope_theta": 5e5})
    assert len(given.frequency_factors) == 8
    assert "rope_scaling_type" not in given.fields


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "gpt2 is not written as GGUF .* convert_hf_to_gguf"),
        ({"model_type": "qwen3", "per_layer_config": {"0": {}}}, "set export.pad: true"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_scaling": {"rope_type": "dynamic"}, "rope_theta": 1e4}, "rope_type dynamic"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_has_no_form_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        form(**changes)
