"""`scope: layer`: a layer trained alone towards what it is to give for its input. DReSS: its own
output in the dense model, with a penalty on what will go. A recovery: the dense layer's output.

No gradient crosses a layer, so all layers can be trained at the same time, each in the memory of
one. Letters: S windows, B windows of a micro-batch, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rayprune.workers.model.description import Model
from rayprune.workers.network.micro_batch import LayerArguments
from rayprune.workers.network.streamed import StreamedModel, output_of
from rayprune.workers.passes.stream import Passed
from rayprune.workers.store.training_stage import Alone, Penalty
from rayprune.workers.training.adapters import add_adapters
from rayprune.workers.training.loop import Ranks, Training
from rayprune.workers.training.objectives import GroupPenalty

NOTHING_GOES = Penalty([{}], 0.0, "l2")


class LayerTransfer(GroupPenalty):
    """How much of its update the layer loses, and the penalty on the units that will go.

    sum_t |f(x_t) - y_t|^2 / |y_t|^2 over sum_t |y_t - x_t|^2 / |y_t|^2, with y_t the dense layer's
    output for x_t: the next layer's norm sees each token relative to its length. 0 is the dense
    layer, 1 a layer that does nothing. Without a penalty nothing will go.
    """

    def __init__(
        self,
        passed: Sequence[Passed],
        arguments: Callable[[int], LayerArguments],
        described: Model,
        penalty: Penalty,
    ) -> None:
        """`passed`: x and y of every window; `arguments(B)`: what a layer gets besides hidden
        states for so many windows.
        """
        super().__init__(described, penalty.removed, penalty.strength, penalty.norm)
        self._passed, self._arguments = passed, arguments
        self._update = sum(
            float(_lengths(y_TD - x_TD, y_TD).mean()) for x_TD, y_TD in passed
        ) / len(passed)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layer is all there is."""
        return [model]

    def losses(self, model: nn.Module, batch_BT: Tensor) -> dict[str, Tensor]:
        """`batch_BT` holds the windows' numbers."""
        given_BTD, wanted_BTD = (
            torch.stack([self._passed[number][side] for number in batch_BT[:, 0].tolist()]).to(
                batch_BT.device, torch.float32
            )
            for side in (0, 1)
        )
        args, kwargs = self._arguments(len(batch_BT))
        found_BTD = output_of(model(given_BTD, *args, **kwargs))
        return {
            "transfer": _lengths(found_BTD - wanted_BTD, wanted_BTD).mean() / (self._update or 1.0)
        }


def _lengths(error: Tensor, output: Tensor) -> Tensor:
    """|error|^2 / |output|^2 of every token."""
    return error.float().square().sum(-1) / output.float().square().sum(-1).clamp_min(
        torch.finfo(torch.float32).tiny
    )


def _trainable(argument: Tensor) -> Tensor:
    """A copy in the type of the weights; what was made in inference mode is of no use in a
    gradient.
    """
    return (
        argument.to(torch.float32, copy=True) if argument.is_floating_point() else argument.clone()
    )


def train_layer(
    model: StreamedModel,
    index: int,
    passed: Sequence[Passed],
    alone: Alone,
    folder: Path,
    warn: Callable[[str], object],
) -> nn.Module:
    """Train one layer in float32, or adapters beside its weights in the type of the passes, from
    its last saved state in `folder` if there is one; the layer. `warn` tells the user something.

    Raises:
        ModelError: the loss or its gradient is not finite.
    """
    options = alone.options
    passed = passed[: options.samples]
    known: dict[int, LayerArguments] = {}

    def arguments(num_windows: int) -> LayerArguments:
        if num_windows not in known:
            tokens_BT = torch.zeros(num_windows, len(passed[0][0]), dtype=torch.int64)
            known[num_windows] = pytree.tree_map_only(
                Tensor, _trainable, model.embed(tokens_BT).arguments[index]
            )
        return known[num_windows]

    held = getattr(torch, options.dtype) if alone.lora else torch.float32
    layer = model.trainable_layer(index, held)
    if alone.lora:
        for parameter in add_adapters(layer, layer, alone.lora, options.seed):
            parameter.data = parameter.data.to(model.device, torch.float32)
    penalty = alone.penalty or NOTHING_GOES
    objective = LayerTransfer(passed, arguments, model.checkpoint.model, penalty)
    numbers_ST = torch.arange(len(passed))[:, None].expand(-1, len(passed[0][0]))
    ranks = Ranks(0, 1, model.device)
    training = Training(
        layer, objective, numbers_ST, options, folder, ranks, held_out=alone.held_out
    )
    training.run()
    for text in training.warnings:
        warn(text)
    return layer
