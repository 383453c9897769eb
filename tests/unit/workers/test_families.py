"""The table of families against models that transformers builds from configs."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayprune.specs.errors import ModelError
from rayprune.workers.model.families import (
    FAMILIES,
    UnitGroup,
    config_int,
    expected_shapes,
    family_of,
    unit_groups,
    unit_parameters,
)
from tests.conftest import SIZES

BIASES: dict[str, dict[str, bool]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "gemma": {"attention_bias": True},
    "gemma2": {"attention_bias": True},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
}
CASES = [(name, {}) for name in FAMILIES] + list(BIASES.items())


def shapes_of(model_type: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of the second layer of a model that transformers builds, without memory for
    them.
    """
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: tuple(parameter.shape) for name, parameter in model.model.layers[1].named_parameters()
    }


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def groups_of(model_type: str, **changes: Any) -> tuple[UnitGroup, UnitGroup]:
    return unit_groups({"model_type": model_type} | SIZES | changes)


@pytest.mark.parametrize(("model_type", "biases"), CASES)
def test_parameters_of_a_unit_are_what_a_model_without_it_lacks(
    model_type: str, biases: dict[str, bool]
) -> None:
    dense = shapes_of(model_type, **biases)
    heads, neurons = groups_of(model_type)
    fewer_heads = shapes_of(model_type, num_attention_heads=2, num_key_value_heads=1, **biases)
    fewer_neurons = shapes_of(model_type, intermediate_size=47, **biases)
    assert unit_parameters(dense, heads) == count(dense) - count(fewer_heads)
    assert unit_parameters(dense, neurons) == count(dense) - count(fewer_neurons)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_expected_shapes_are_those_of_transformers(model_type: str) -> None:
    shapes = shapes_of(model_type)
    expected = expected_shapes({"model_type": model_type} | SIZES)
    assert expected.items() <= shapes.items()
    assert len(expected) == 7


@pytest.mark.parametrize("model_type", FAMILIES)
def test_groups_name_modules_of_the_layer(model_type: str) -> None:
    names = shapes_of(model_type)
    for group in groups_of(model_type):
        assert group.consumer.startswith(f"{group.block}.")
        assert names[f"{group.consumer}.weight"][1] == group.width
        for producer in group.producers:
            assert names[f"{producer.module}.weight"][0] == producer.rows * group.num_units


def test_missing_head_keys_have_their_defaults() -> None:
    heads, _ = unit_groups(
        {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8}
    )
    assert (heads.num_units, heads.columns, heads.width) == (4, 8, 32)
    assert [producer.rows for producer in heads.producers] == [8, 8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported are llama, mistral",
        ),
        (
            {"model_type": None},
            "model_type None is not supported|model_type 'None' is not supported",
        ),
        (
            {"num_attention_heads": 5},
            r"num_attention_heads \(5\) is no multiple of num_key_value_heads \(2\)",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, found 0"),
        ({"intermediate_size": 1.5}, "intermediate_size must be a positive integer, found 1.5"),
        ({"head_dim": "8"}, "head_dim must be a positive integer, found '8'"),
    ],
)
def test_unusable_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        unit_groups({"model_type": "llama"} | SIZES | changes)


def test_config_int_takes_null_for_missing() -> None:
    assert config_int({"a": None}, "a", 3) == config_int({}, "a", 3) == 3
    with pytest.raises(ModelError, match="a must be a positive integer, found None"):
        config_int({"a": None}, "a")


def test_the_rules_about_heads_are_those_of_transformers() -> None:
    """A config class that comes to accept (or refuse) uneven heads shows here."""
    for model_type, family in FAMILIES.items():
        sizes = SIZES | {
            "hidden_size": 32,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 8,
        }
        try:
            AutoConfig.for_model(model_type, **sizes)
            refused = False
        except Exception as error:  # of a type that transformers changes
            refused = "hidden" in str(error)
        assert refused is family.heads_divide_hidden, model_type
        assert family_of({"model_type": model_type}) is family
