"""Shapes from configs against models that transformers builds, and layers as data."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import open_checkpoint, planned_checkpoint
from rayprune.workers.model.families import FAMILIES, PLANNED, why_not_pruned
from rayprune.workers.model.shapes import (
    alike_layers,
    attention_width,
    count_parameters,
    coupled_groups,
    layer_shapes,
    outer_shapes,
)
from tests.conftest import SIZES, MakeModel

BIASED = {"attention_bias": True, "mlp_bias": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    *((name, BIASED) for name in FAMILIES),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma", {"tie_word_embeddings": False}),
]
MIXTRAL: dict[str, Any] = SIZES | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LATENT: dict[str, Any] = SIZES | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}
EXPERTS: list[dict[str, Any]] = [
    MIXTRAL,
    LATENT,
    LATENT | {"q_lora_rank": None},
    LATENT | {"first_k_dense_replace": 0},
]


def built(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_shapes_are_those_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    """Also where keys are not in the config: it is reduced to the sizes and the changes."""
    config = {"model_type": model_type} | SIZES | changes
    model = built(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    outer = {
        name: shape for name, shape in expected.items() if not name.startswith("model.layers.")
    }
    assert outer_shapes(config) == outer
    for layer in range(3):
        assert layer_shapes(config, layer) == {
            name: tuple(p.shape) for name, p in model.model.layers[layer].named_parameters()
        }


@pytest.mark.parametrize("config", EXPERTS)
def test_models_with_experts_have_as_many_parameters_as_transformers_says(
    config: dict[str, Any],
) -> None:
    """transformers joins the experts' matrices, so counts are compared; the router's correction is
    a buffer there.
    """
    model, corrections = built(config), 0
    for layer in range(3):
        shapes = layer_shapes(config, layer)
        correction = count_parameters(
            {name: shape for name, shape in shapes.items() if "correction" in name}
        )
        corrections += correction
        assert count_parameters(shapes) - correction == sum(
            p.numel() for p in model.model.layers[layer].parameters()
        )
    total = count_parameters(outer_shapes(config)) + sum(
        count_parameters(layer_shapes(config, layer)) for layer in range(3)
    )
    assert total - corrections == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", EXPERTS)
def test_parameters_of_a_unit_are_what_a_model_without_it_lacks(config: dict[str, Any]) -> None:
    narrower = {"neurons": "intermediate_size", "experts": "moe_intermediate_size"}
    shapes = layer_shapes(config, 2)
    groups = {group.name: group for group in coupled_groups(config, 2, shapes)}
    for name, key in narrower.items():
        if name in groups:
            lost = count_parameters(shapes) - count_parameters(
                layer_shapes(config | {key: config[key] - 1}, 2)
            )
            shared = groups["shared"].unit_parameters if "shared" in groups else 0
            assert groups[name].count * groups[name].unit_parameters + shared == lost
    heads = groups["heads"]
    fewer = {"num_attention_heads": 2, "num_key_value_heads": heads.num_units // 2}
    assert heads.parameters // 2 == count_parameters(shapes) - count_parameters(
        layer_shapes(config | fewer, 2)
    )


def test_dense_layers_come_before_those_with_experts() -> None:
    assert alike_layers(LATENT) == [range(1), range(1, 3)]
    assert alike_layers(LATENT | {"first_k_dense_replace": 0}) == [range(3)]
    assert alike_layers(LATENT | {"first_k_dense_replace": 9}) == [range(3)]
    assert alike_layers(MIXTRAL) == [range(3)]
    names = [
        [group.name for group in coupled_groups(LATENT, layer, layer_shapes(LATENT, layer))]
        for layer in range(3)
    ]
    assert names == [["heads", "neurons"], *[["heads", "experts", "shared"]] * 2]


def test_attention_width_is_scores_and_values_over_all_heads() -> None:
    assert attention_width({"model_type": "llama"} | SIZES) == 4 * (8 + 8)
    assert attention_width(LATENT) == 4 * (6 + 4 + 5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_alone_plans_like_the_headers(model_type: str, make_model: MakeModel) -> None:
    folder = make_model(model_type, dtype=torch.bfloat16)
    with_weights = planned_checkpoint(folder)
    assert with_weights == open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    planned = planned_checkpoint(folder)
    assert (with_weights.has_weights, planned.has_weights) == (True, False)
    for layer in range(3):
        found, implied = with_weights.layer_tensors(layer), planned.layer_tensors(layer)
        assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
            n: (i.dtype, i.shape) for n, i in implied.items()
        }
    assert planned.outer_tensors.keys() == with_weights.outer_tensors.keys()
    assert (planned.parameters, planned.decoder_parameters) == (
        with_weights.parameters,
        with_weights.decoder_parameters,
    )
    assert planned.bytes_on_disk == 2 * planned.parameters
    with pytest.raises(ModelError, match=r"needs model\.safetensors or .*; no weights found"):
        open_checkpoint(folder)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        layer_shapes({"model_type": "mamba"}, 0)


@pytest.mark.parametrize("model_type", PLANNED)
def test_a_planned_family_says_why_it_is_not_pruned(model_type: str) -> None:
    assert PLANNED[model_type] in str(why_not_pruned({"model_type": model_type}))
    assert why_not_pruned({"model_type": "llama"}) is None
    assert "quantised" in str(why_not_pruned({"model_type": "llama", "quantization_config": {}}))
