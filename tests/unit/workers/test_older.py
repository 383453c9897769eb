"""What transformers 4 reads beside what 5 reads."""

from typing import Any

import pytest

from rayprune.workers.model.older import readable_by_both, tokenizer_readable_by_both, why_not_by_4

DEFAULT = {"rope_type": "default", "rope_theta": 1e5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
HALF = DEFAULT | {"partial_rotary_factor": 0.5}
NEAR = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("model_type", "rotary", "added"),
    [
        ("llama", DEFAULT, {"rope_theta": 1e5}),
        (
            "llama",
            LLAMA3,
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ("phi", HALF, {"rope_theta": 1e5, "partial_rotary_factor": 0.5}),
        ("gpt_neox", HALF, {"rotary_emb_base": 1e5, "rotary_pct": 0.5}),
        ("qwen3", {"full_attention": DEFAULT, "sliding_attention": DEFAULT}, {"rope_theta": 1e5}),
        (
            "gemma3_text",
            {"full_attention": LINEAR, "sliding_attention": NEAR},
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
            },
        ),
        (None, None, {}),
    ],
)
def test_rotary_positions_are_said_in_both_ways(
    model_type: str | None, rotary: Any, added: dict[str, Any]
) -> None:
    config = {"model_type": model_type} | ({"rope_parameters": rotary} if rotary else {})
    assert readable_by_both(config) == config | added
    assert readable_by_both(config | {"rope_theta": 7.0})["rope_theta"] == 7.0  # as it was
    assert why_not_by_4(config) is None


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "ministral3"}, "no model_type"),
        ({"model_type": "llama", "per_layer_config": {"0": {}}}, "different sizes"),
        (
            {
                "model_type": "exaone4",
                "rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT},
            },
            "one rope_theta",
        ),
    ],
)
def test_what_4_cannot_read(config: dict[str, Any], why: str) -> None:
    assert why in str(why_not_by_4(config))


def test_a_tokenizer_has_names_that_both_know() -> None:
    given = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "x": 1}
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "x": 1,
    }
    assert tokenizer_readable_by_both(given) == found
    assert tokenizer_readable_by_both(found) == found
