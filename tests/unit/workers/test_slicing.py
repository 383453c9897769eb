"""Slicing against the definition: a pruned layer computes what the dense one does without the
pruned units.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rayprune.specs.errors import SpecError
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.description import Group
from rayprune.workers.network.reading import layer_tensors
from rayprune.workers.network.slicing import Cut, slice_layer
from rayprune.workers.network.streamed import StreamedModel, output_of
from rayprune.workers.numerics.linalg import unit_rows
from tests.conftest import MakeModel
from tests.helpers import families
from tests.unit.workers.test_descriptions import OLD

LAYER = 1
BIASED = {"attention_bias": True, "mlp_bias": True}


def masked(layer: Any, group: Group, cut: Cut) -> None:
    """Make the dense layer's consumer read the kept units alone, through the corrected weight."""
    consumer = layer.get_submodule(group.consumer.module)
    weight = torch.zeros_like(consumer.weight)
    weight_DF = weight.T if group.consumer.transposed else weight
    weight_DF[:, unit_rows(cut.units, group.columns)] = cut.weight_DK
    consumer.weight = nn.Parameter(weight)


def random_cuts(checkpoint: Checkpoint, kept: dict[str, list[int]]) -> dict[str, Cut]:
    generator, hidden = torch.Generator().manual_seed(5), checkpoint.model.hidden
    groups = {group.name: group for group in checkpoint.model.groups}
    return {
        name: Cut(
            name,
            torch.tensor(units),
            torch.randn(hidden, len(units) * groups[name].columns, generator=generator) * 0.2,
        )
        for name, units in kept.items()
    }


@torch.inference_mode()
def outputs(folder: Path, kept: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
    """Of the masked dense layer, and of a layer of the pruned config with the sliced tensors."""
    checkpoint = open_checkpoint(folder)
    groups, cuts = checkpoint.model.groups, random_cuts(checkpoint, kept)
    units = {group.name: len(kept.get(group.name, range(group.num_units))) for group in groups}
    form = checkpoint.form(units, "transformers")
    there = range(checkpoint.num_layers)
    written = checkpoint.written(there, [units] * len(there), "transformers", "auto").config
    config = AutoConfig.for_model(
        **{**written, "architectures": None, "transformers_version": None}
    )
    pruned: Any = AutoModelForCausalLM.from_config(config).eval()
    pruned = pruned.get_submodule(f"{form.layers_at or checkpoint.model.layers_at}.{LAYER}")
    sliced = slice_layer(layer_tensors(checkpoint, LAYER), groups, cuts)
    pruned.load_state_dict(form.layer(sliced))
    model = StreamedModel(checkpoint, torch.float32, torch.device("cpu"))
    batch = model.embed(torch.arange(3, 27).reshape(2, 12))
    args, kwargs = batch.arguments[LAYER]
    dense: Any = model.load_layer(LAYER)
    for group in groups:
        if group.name in cuts:
            masked(dense, group, cuts[group.name])
    expected, found = (layer(batch.hidden_BTD, *args, **kwargs) for layer in (dense, pruned))
    return output_of(expected), output_of(found)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", families())
@pytest.mark.parametrize(
    "kept",
    [
        {"heads": [1], "neurons": [0, 3, 4, 17, 40, 47]},
        {"heads": [0]},
        {"neurons": list(range(1, 48, 2))},
    ],
)
def test_pruned_layer_equals_masked_dense_layer(
    model_type: str, kept: dict[str, list[int]], make_model: MakeModel
) -> None:
    folder = make_model(model_type)
    if "heads" in kept and model_type == "gptj":
        pytest.skip("as Phi its layers are given other rotary tables")
    groups = open_checkpoint(folder).model.groups
    if reasons := [group.fixed for group in groups if group.name in kept and group.fixed]:
        with pytest.raises(SpecError, match=re.escape(reasons[0])):
            outputs(folder, kept)
        return
    expected, found = outputs(folder, kept)
    assert relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "biases"),
    [
        ("llama", BIASED),
        ("qwen3", {"attention_bias": True}),
        ("smollm3", BIASED),
        ("cohere", {"use_qk_norm": True}),
        ("falcon", OLD | {"bias": True}),
        ("falcon", {"num_ln_in_parallel_attn": 1}),
    ],
)
def test_biases_follow_their_rows(
    model_type: str, biases: dict[str, bool], make_model: MakeModel
) -> None:
    expected, found = outputs(
        make_model(model_type, **biases), {"heads": [1], "neurons": [2, 5, 30]}
    )
    assert relative_difference(found, expected) < 1e-6


def test_llama_with_biases_is_granite_where_its_config_refuses_the_heads(
    make_model: MakeModel,
) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    folder = make_model(**BIASED, **heads)
    form = open_checkpoint(folder).form({"heads": 3, "neurons": 48}, "transformers")
    assert form.changes["model_type"] == "granite"
    expected, found = outputs(folder, {"heads": [0, 1, 3], "neurons": [2, 5, 30]})
    assert relative_difference(found, expected) < 1e-6


def test_three_groups_keep_their_own_query_heads(make_model: MakeModel) -> None:
    folder = make_model("qwen3", num_attention_heads=6, num_key_value_heads=3)
    for units in ([0, 2], [1], [0, 1, 2]):
        expected, found = outputs(folder, {"heads": units})
        assert relative_difference(found, expected) < 1e-6


def test_rows_of_units() -> None:
    assert unit_rows(torch.tensor([0, 3]), 2).tolist() == [0, 1, 6, 7]
    assert unit_rows(torch.tensor([4]), 1).tolist() == [4]
    assert unit_rows(torch.tensor([], dtype=torch.int64), 3).tolist() == []


def test_tensors_without_a_cut_pass_through_and_results_stand_alone(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model(dtype=torch.bfloat16))
    tensors = layer_tensors(checkpoint, 0)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    cuts = random_cuts(checkpoint, {"neurons": [1, 2, 40]})
    sliced = slice_layer(tensors, checkpoint.model.groups, cuts)
    assert sliced.keys() == tensors.keys()
    touched = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    for name, tensor in sliced.items():
        assert tensor.is_contiguous()
        assert tensor.dtype == (torch.float32 if name == "mlp.down_proj.weight" else torch.bfloat16)
        assert torch.equal(tensors[name], before[name])
        assert (tensor.shape == before[name].shape) is (name not in touched)
    assert torch.equal(sliced["mlp.up_proj.weight"], before["mlp.up_proj.weight"][[1, 2, 40]])
    assert torch.equal(sliced["mlp.down_proj.weight"], cuts["neurons"].weight_DK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuts_travel_without_loss(dtype: torch.dtype) -> None:
    cut = Cut(
        "heads",
        torch.tensor([0, 2, 5]),
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype),
    )
    arrays = cut.arrays()
    for array in (arrays["units"], arrays["weight"]):
        array.setflags(write=False)  # as the object store hands them out
    back = Cut.from_arrays(arrays)
    assert back.group == "heads"
    assert torch.equal(back.units, cut.units)
    assert torch.equal(back.weight_DK.to(dtype), cut.weight_DK)
    assert not np.shares_memory(back.weight_DK.numpy(), arrays["weight"])
