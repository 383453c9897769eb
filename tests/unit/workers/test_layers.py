"""Layers loaded one at a time against the stock model, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.description import Group
from rayprune.workers.network.building import layers_of
from rayprune.workers.network.layers import (
    apply_cut,
    consumer_input,
    dense_pass,
    dense_streams,
    finish_layer,
    project,
    stream_before,
)
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import StreamedModel, output_of
from tests.conftest import MakeModel
from tests.helpers import families, normalised, some
from tests.unit.workers.test_descriptions import FALCONS

CPU = torch.device("cpu")
TOKENS_BT = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))
VARIANTS: list[Any] = [
    *((name, {}) for name in families()),
    ("mistral", {"sliding_window": 8}),
    ("gemma2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    *(("falcon", kind) for kind in FALCONS),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
]


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[StreamedModel, Checkpoint]:
    checkpoint = open_checkpoint(folder)
    return StreamedModel(checkpoint, dtype, CPU), checkpoint


def groups_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return {group.name: group for group in checkpoint.model.groups}


def weight_of(layer: Any, group: Group) -> Tensor:
    """The consumer's weight (D, F)."""
    weight: Tensor = layer.get_submodule(group.consumer.module).weight.detach()
    return weight.T if group.consumer.transposed else weight


@torch.inference_mode()
def stock_hidden(
    model: Any, checkpoint: Checkpoint, tokens_BT: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Output of every layer, and the logits, of the stock model."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, args, output: outputs.append(output_of(output)))
        for layer in layers_of(model, checkpoint.model)
    ]
    logits: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return outputs, logits


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16], torch.float32))
def test_streaming_equals_the_stock_model_bit_for_bit(
    model_type: str, changes: dict[str, Any], dtype: torch.dtype, make_model: MakeModel
) -> None:
    folder = make_model(model_type, **changes)
    model, checkpoint = streamed(folder, dtype)
    expected, expected_logits = stock_hidden(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), checkpoint, TOKENS_BT
    )
    batch = model.embed(TOKENS_BT)
    assert len(batch.arguments) == len(expected) == 3
    for index, output in enumerate(expected):
        finish_layer(model.load_layer(index), index, batch, groups_of(checkpoint))
        assert torch.equal(batch.hidden_BTD, output)
    assert torch.equal(model.logits(TOKENS_BT, batch.hidden_BTD), expected_logits)


@pytest.mark.parametrize("model_type", families())
def test_consumer_inputs_are_those_of_the_stock_layer(
    model_type: str, make_model: MakeModel
) -> None:
    folder = make_model(model_type)
    stock, seen = AutoModelForCausalLM.from_pretrained(folder), dict[tuple[int, str], Tensor]()
    model, checkpoint = streamed(folder)
    groups = groups_of(checkpoint)
    for index, layer in enumerate(layers_of(stock, checkpoint.model)):
        for group in groups.values():

            def note(
                _module: object,
                args: tuple[Tensor, ...],
                key: tuple[int, str] = (index, group.name),
            ) -> None:
                seen[key] = args[0].view(*TOKENS_BT.shape, -1)  # OPT flattens it

            layer.get_submodule(group.consumer.module).register_forward_pre_hook(note)
    stock_hidden(stock, checkpoint, TOKENS_BT)
    batch, probe = model.embed(TOKENS_BT), model.embed(TOKENS_BT)
    for index in range(3):
        layer = model.load_layer(index)
        for name in groups:
            assert torch.equal(consumer_input(layer, index, batch, groups, name), seen[index, name])
        for name, z_BTF in dense_pass(layer, index, probe, groups).items():
            assert torch.equal(z_BTF, seen[index, name])
        finish_layer(layer, index, batch, groups)
        assert torch.equal(batch.hidden_BTD, probe.hidden_BTD)
        assert not batch.inputs
        assert not batch.outputs


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_keeping_every_unit_with_its_weight_changes_nothing(
    model_type: str, changes: dict[str, Any], make_model: MakeModel
) -> None:
    model, checkpoint = streamed(make_model(model_type, **changes))
    groups = groups_of(checkpoint)
    batch, dense = model.embed(TOKENS_BT), model.embed(TOKENS_BT)
    for index in range(3):
        layer = model.load_layer(index)
        for name, group in groups.items():
            cut = Cut(name, torch.arange(group.num_units), weight_of(layer, group))
            apply_cut(layer, index, batch, groups, name, cut)
            assert name not in batch.inputs
        finish_layer(layer, index, batch, groups)
        finish_layer(layer, index, dense, groups)
        torch.testing.assert_close(batch.hidden_BTD, dense.hidden_BTD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", families(*normalised()))
def test_streams_are_what_blocks_add_up_to(model_type: str, make_model: MakeModel) -> None:
    model, checkpoint = streamed(make_model(model_type))
    groups, layer, batch = groups_of(checkpoint), model.load_layer(0), model.embed(TOKENS_BT)
    behind = dense_streams(layer, 0, batch, groups)
    stream_BTD = batch.hidden_BTD
    for name, group in groups.items():
        torch.testing.assert_close(stream_before(batch, groups, name), stream_BTD)
        z_BTF = consumer_input(layer, 0, batch, groups, name)
        added_BTD = group.block.scale * project(layer, group, z_BTF)
        torch.testing.assert_close(stream_BTD + added_BTD, behind[name])
        stream_BTD = behind[name]
        cut = Cut(name, torch.arange(group.num_units), weight_of(layer, group))
        apply_cut(layer, 0, batch, groups, name, cut)
    finish_layer(layer, 0, batch, groups)
    torch.testing.assert_close(batch.hidden_BTD, behind["neurons"])


def test_streams_of_blocks_that_are_normalised_first_are_not_known(make_model: MakeModel) -> None:
    model, checkpoint = streamed(make_model("gemma2"))
    groups, layer, batch = groups_of(checkpoint), model.load_layer(0), model.embed(TOKENS_BT)
    assert [group.block.scale for group in groups.values()] == [None, None]
    z_BTF = consumer_input(layer, 0, batch, groups, "heads")
    batch.outputs["self_attn"] = project(layer, groups["heads"], z_BTF)
    with pytest.raises(AssertionError, match="the output of self_attn is not added as it is"):
        stream_before(batch, groups, "neurons")
    with pytest.raises(AssertionError, match="the output of self_attn is not added as it is"):
        dense_streams(layer, 0, batch, groups)


@pytest.mark.parametrize("model_type", families())
def test_a_known_block_is_not_computed_again(model_type: str, make_model: MakeModel) -> None:
    """After the cut of the heads the attention block is a constant: its weights no longer
    matter.
    """
    model, checkpoint = streamed(make_model(model_type))
    groups, layer = groups_of(checkpoint), None
    outputs: list[Tensor] = []
    for spoil in (False, True):
        batch, layer = model.embed(TOKENS_BT), model.load_layer(0)
        cut = Cut("heads", torch.tensor([1]), torch.ones(32, groups["heads"].columns) * 0.1)
        apply_cut(layer, 0, batch, groups, "heads", cut)
        if spoil:
            with torch.no_grad():
                name = groups["heads"].axes[-1].tensor.rpartition(".")[0]
                layer.get_submodule(name).weight.fill_(torch.nan)
        outputs.append(consumer_input(layer, 0, batch, groups, "neurons"))
        finish_layer(layer, 0, batch, groups)
        outputs.append(batch.hidden_BTD)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_layers_are_whole_again_after_a_step(make_model: MakeModel) -> None:
    model, checkpoint = streamed(make_model())
    layer, groups, batch = model.load_layer(0), groups_of(checkpoint), model.embed(TOKENS_BT)
    before = {name: type(module) for name, module in layer.named_modules()}
    for name in groups:
        consumer_input(layer, 0, batch, groups, name)
    assert {name: type(module) for name, module in layer.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def test_arguments_are_shared_between_batches_of_a_shape_only(make_model: MakeModel) -> None:
    model, _ = streamed(make_model())
    first = model.embed(TOKENS_BT)
    second, short = model.embed(TOKENS_BT.flip(0), first), model.embed(TOKENS_BT[:1], None)
    assert second.arguments is first.arguments
    assert torch.equal(second.hidden_BTD, first.hidden_BTD.flip(0))
    assert short.hidden_BTD.shape == (1, 24, 32)
    assert len(short.arguments) == 3


def poison(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, make_model: MakeModel) -> None:
    folder = make_model()
    poison(folder, "model.layers.1.mlp.up_proj.weight", value)
    model, _ = streamed(folder)
    model.load_layer(0)
    with pytest.raises(
        ModelError,
        match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity",
    ):
        model.load_layer(1)


def test_embeddings_that_are_not_finite_are_named(make_model: MakeModel) -> None:
    folder = make_model()
    poison(folder, "model.embed_tokens.weight", float("nan"))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight holds NaN"):
        streamed(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_missing_outer_tensors_are_named(name: str, make_model: MakeModel) -> None:
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is missing"):
        streamed(folder)


def test_superfluous_layer_tensors_are_refused(make_model: MakeModel) -> None:
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{layer}.mlp.up_proj.bias": torch.zeros(48) for layer in range(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.bias, which no causal"):
        streamed(folder)


def test_a_group_the_layer_never_reaches_is_an_error(make_model: MakeModel) -> None:
    model, checkpoint = streamed(make_model())
    groups, batch = groups_of(checkpoint), model.embed(TOKENS_BT)
    known = MicroBatch(batch.hidden_BTD, batch.arguments, outputs={"self_attn": batch.hidden_BTD})
    with pytest.raises(RuntimeError, match=r"layer 0 never called self_attn\.o_proj"):
        consumer_input(model.load_layer(0), 0, known, groups, "heads")
