"""Which lists of a config have an entry for each layer: those known by name, never others that are
as long by chance.
"""

from typing import Any

import pytest

from rayprune.workers.model.config import Config
from rayprune.workers.model.rewrite import of_layers

OTHERS: dict[str, Any] = {
    "eos_token_id": [2, 32000, 32007],
    "bad_words_ids": [[5], [6], [7]],
    "architectures": ["A", "B", "C"],
    "an_unknown_key": [1, 2, 3],
}
"""As long as there are layers, and about something else."""


def config_of_layers(config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    return dict(of_layers(Config(config), layers).raw)


@pytest.mark.parametrize("key", OTHERS)
def test_a_list_that_is_as_long_by_chance_stays(key: str) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3, key: OTHERS[key]}
    assert of_layers(Config(config), [0, 2]).raw == config | {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model_type", "key", "values"),
    [
        ("gemma2", "layer_types", ["sliding_attention", "full_attention", "sliding_attention"]),
        ("mistral", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("smollm3", "no_rope_layers", [0, 1, 1]),
    ],
)
def test_a_list_with_an_entry_for_each_layer_is_cut(
    model_type: str, key: str, values: list[Any]
) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 3, "eos_token_id": [2, 3, 4]}
    cut = of_layers(Config(config | {key: values}), [0, 2]).raw
    assert cut[key] == [values[0], values[2]]
    assert cut["eos_token_id"] == [2, 3, 4]


def test_gpt_neo_says_its_kinds_twice() -> None:
    """Its class reads the one, other programs the other."""
    kinds, original = ["global", "local"], {"model_type": "gpt_neo", "num_layers": 4}
    types = {"attention_types": [[kinds, 2]], "attention_layers": kinds * 2}
    for given in ({"attention_types": [[kinds, 2]]}, types):
        cut = of_layers(Config(original | given), [0, 1, 3]).raw
        assert cut["attention_types"] == [[["global", "local", "local"], 1]]
        assert cut["attention_layers"] == ["global", "local", "local"]


def test_what_a_class_works_out_from_a_layer_s_number_is_written() -> None:
    original = Config({"model_type": "smollm3", "num_hidden_layers": 8})
    cut = of_layers(original, [0, 3, 7]).raw
    assert cut["no_rope_layers"] == [1, 0, 0]
