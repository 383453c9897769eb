"""Gradients of the loss at the consumers' inputs, against autograd on the whole model and against
finite differences.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayprune.specs.errors import ModelError
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.building import layers_of, whole_model
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.gradients import added, squared_gradients
from tests.conftest import MakeModel
from tests.helpers import families

WINDOWS = [
    torch.tensor([[3, 77, 15, 200, 9, 31, 8, 120]]),
    torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]),
]


def measured(folder: Path, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, dtype, torch.device("cpu"))
    groups = {group.name: group for group in checkpoint.model.groups}
    return squared_gradients(model, groups, WINDOWS, 0, Scratch(model.device, None))


def loss_of(model: Any, window: Tensor, seed: int = 0) -> Tensor:
    """The negative log-likelihood of tokens drawn from the predictions."""
    log_p = torch.log_softmax(model(input_ids=window, use_cache=False).logits.flatten(0, 1), -1)
    drawn = torch.multinomial(
        log_p.detach().float().exp(), 1, generator=torch.Generator().manual_seed(seed)
    )
    return -log_p.gather(1, drawn).sum()


@pytest.mark.parametrize("model_type", families())
def test_layer_by_layer_they_are_those_of_the_whole_model(
    model_type: str, make_model: MakeModel
) -> None:
    folder = make_model(model_type)
    checkpoint, model = open_checkpoint(folder), whole_model(open_checkpoint(folder)).eval()
    inputs: dict[tuple[str, int], Tensor] = {}

    def noting(name: str, index: int) -> Any:
        return lambda module, args: inputs.update({(name, index): args[0]})

    for group in checkpoint.model.groups:
        for index, layer in enumerate(layers_of(model, checkpoint.model)):
            consumer = layer.get_submodule(group.consumer.module)
            consumer.register_forward_pre_hook(noting(group.name, index))
    for seed, (window, found) in enumerate(zip(WINDOWS, measured(folder), strict=True)):
        loss = loss_of(model, window, seed)
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        for (name, index), gradient in zip(inputs, gradients, strict=True):
            expected_F = gradient.flatten(0, -2).double().square().sum(0)
            torch.testing.assert_close(
                found[name][index], expected_F, rtol=1e-4, atol=float(expected_F.max()) * 1e-6
            )


def test_the_gradient_of_one_number_by_finite_differences(make_model: MakeModel) -> None:
    """One token's number is moved: with one token its gradient is all there is of a column."""
    folder, window = make_model(), torch.tensor([[3]])
    checkpoint, model = (
        open_checkpoint(folder),
        whole_model(open_checkpoint(folder)).double().eval(),
    )
    streamed = StreamedModel(checkpoint, torch.float32, torch.device("cpu"))
    groups = {group.name: group for group in checkpoint.model.groups}
    (found,) = squared_gradients(streamed, groups, [window], 0, Scratch(streamed.device, None))
    consumer = model.model.layers[2].get_submodule(groups["neurons"].consumer.module)

    def loss_moved(step: float) -> float:
        def move(module: Any, args: Any) -> Any:
            moved_BTF = args[0].clone()
            moved_BTF[0, 0, 5] += step
            return (moved_BTF,)

        handle = consumer.register_forward_pre_hook(move)
        with torch.no_grad():
            loss = float(loss_of(model, window))
        handle.remove()
        return loss

    slope = (loss_moved(1e-3) - loss_moved(-1e-3)) / 2e-3
    assert float(found["neurons"][2, 5].sqrt()) == pytest.approx(abs(slope), rel=1e-3)


def test_sums_are_added_by_group() -> None:
    one, two = {"heads": torch.ones(2, 3)}, {"heads": torch.full((2, 3), 2.0)}
    assert torch.equal(added(one, two)["heads"], torch.full((2, 3), 3.0))


def test_weights_in_another_type_give_the_same_gradients(make_model: MakeModel) -> None:
    """Weights in bfloat16 on disk stay there and are converted part by part, in a backward pass,
    too.
    """
    folder = make_model("llama", dtype="bfloat16")
    model = whole_model(open_checkpoint(folder)).float().eval()
    caught: list[Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: caught.append(args[0])
    )
    (gradient,) = torch.autograd.grad(loss_of(model, WINDOWS[0]), caught)
    expected_F = gradient.flatten(0, -2).double().square().sum(0)
    torch.testing.assert_close(
        measured(folder)[0]["neurons"][0],
        expected_F,
        rtol=1e-4,
        atol=float(expected_F.max()) * 1e-6,
    )


def test_predictions_that_are_not_finite_are_named(make_model: MakeModel) -> None:
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 3e38  # finite, but not its product with a number above 1.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="predictions are not finite"):
        measured(folder)
