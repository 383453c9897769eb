"""Micro-batches on their way through a chunk of consecutive layers: of calibration text on the
dense path (`placement: layers`), or of a recovery's through the pruned model.

Every layer's statistics grow at the same time, one micro-batch after the other in the order of the
calibration text: sums have the same bits wherever a chunk begins or ends. Hidden states come from
the worker of the chunk before, or from files where a wave of chunks has ended.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rayprune.specs.errors import VerificationError
from rayprune.workers.model.description import Group
from rayprune.workers.network import layers
from rayprune.workers.network.micro_batch import HIDDEN, MicroBatch, Store
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.numerics.codec import from_array, to_array
from rayprune.workers.numerics.statistics import Statistic
from rayprune.workers.passes.sealed import read_sealed, write_sealed
from rayprune.workers.passes.sweep import check_finite
from rayprune.workers.store.files import remove
from rayprune.workers.store.layout import RESIDUAL_STREAM, boundary_file

Fits = tuple[Statistic, Statistic]
"""The statistics of the training and of the held-out windows."""
Wanted = Mapping[int, Collection[str]]
"""The layers, and of each the groups whose statistics are collected, or `RESIDUAL_STREAM`."""
Saved = tuple[Path, Path | None]
"""Folders of hidden states before a chunk, and at the end of a wave behind it."""
State = dict[str, np.ndarray]
"""The state of a micro-batch on its way to another process."""
Passed = tuple[Tensor, Tensor]
"""The hidden states (T, D) of a window before a layer, and those it gives or is to give."""


class DenseLayers:
    """What layers of the dense model make of hidden states that layers of a pruned one are given
    (`Goal`).
    """

    def __init__(self, model: StreamedModel, bounds: Sequence[int]) -> None:
        self._model, self._bounds = model, bounds
        self._modules: dict[int, nn.Module] = {}
        self._arguments: dict[torch.Size, MicroBatch] = {}

    def begin(self, chunk: range) -> None:
        """Load those that belong to a chunk of the pruned model."""
        self._modules = {}  # freed before the new ones are read
        numbers = range(self._bounds[chunk.start], self._bounds[chunk.stop])
        self._modules = {
            number: self._model.load_layer(number, prefetch=number + 1 < numbers.stop)
            for number in numbers
        }

    def output(self, layer: int, tokens_BT: Tensor, given_BTD: Tensor) -> Tensor:
        """What a layer of the pruned model is to give (B, T, D)."""
        if tokens_BT.shape not in self._arguments:
            self._arguments[tokens_BT.shape] = self._model.embed(tokens_BT)
        batch = MicroBatch(given_BTD, self._arguments[tokens_BT.shape].arguments)
        for number in range(self._bounds[layer], self._bounds[layer + 1]):
            layers.dense_pass(self._modules[number], number, batch, {})
        return batch.hidden_BTD


class Stream:
    """The chunk one worker works on: its layers and their statistics."""

    def __init__(
        self,
        model: StreamedModel,
        groups: Sequence[Group],
        empty: Callable[[Group], Statistic],
        batches: Sequence[Tensor],
        num_training: int,
        keep: Store,
        goal: DenseLayers | None = None,
    ) -> None:
        """`empty(group)` makes a statistic; the first `num_training` micro-batches are for
        training; `keep` puts away hidden states. Layers are to give what `goal` says, or what they
        give.
        """
        self._goal = goal
        self._keep, self._passed = keep, dict[int, list[Passed]]()
        self._model, self._empty, self._batches, self._num_training = (
            model,
            empty,
            batches,
            num_training,
        )
        self._groups = {group.name: group for group in groups}
        self._modules: dict[int, nn.Module] = {}
        self._arguments: dict[torch.Size, MicroBatch] = {}
        self._fits: dict[tuple[int, str], Fits] = {}

    def flow(
        self, chunk: range, number: int, wanted: Wanted, saved: Saved, before: State | None
    ) -> State | None:
        """Take one micro-batch through the chunk and add it to the wanted statistics.

        `before` holds its state from the chunk before (None: embeddings, or the file of the
        wave before); that behind the chunk is returned, or at the end of a wave written to a
        file, if anything follows. `saved` are the folders of the files before and behind the chunk.
        """
        if number == 0:
            self._begin(chunk, wanted)
        batch = self._entering(chunk.start, number, saved[0], before)
        for index in chunk:
            watched = {
                name: self._groups[name] for name in wanted.get(index, ()) if name in self._groups
            }
            given_BTD = batch.hidden_BTD
            self._note(
                index, number, layers.dense_pass(self._modules[index], index, batch, watched)
            )
            if RESIDUAL_STREAM in wanted.get(index, ()):
                wanted_BTD = (
                    self._goal.output(index, self._batches[number], given_BTD)
                    if self._goal
                    else batch.hidden_BTD
                )
                kept = self._keep(given_BTD), self._keep(wanted_BTD)
                self._passed.setdefault(index, []).extend(zip(*kept, strict=True))
        if saved[1] is None:
            return {name: to_array(tensor) for name, tensor in batch.state().items()}
        if chunk.stop < len(batch.arguments):
            state = {name: tensor.contiguous() for name, tensor in batch.state().items()}
            write_sealed(boundary_file(saved[1], number), state)
        return None

    def _begin(self, chunk: range, wanted: Wanted) -> None:
        self._modules = {}  # freed before the new ones are read
        self._modules = {
            index: self._model.load_layer(index, prefetch=index + 1 < chunk.stop) for index in chunk
        }
        if self._goal:
            self._goal.begin(chunk)
        self._passed = {}
        self._fits = {
            (layer, name): self._empty_fits(name)
            for layer in chunk
            for name in wanted.get(layer, ())
            if name in self._groups
        }

    def _empty_fits(self, name: str) -> Fits:
        group = self._groups[name]
        return self._empty(group), self._empty(group)

    def _entering(self, layer: int, number: int, saved: Path, before: State | None) -> MicroBatch:
        """The micro-batch before a layer; the layers' arguments are recorded once per shape, but
        for those that depend on the tokens.
        """
        tokens_BT, described = self._batches[number], self._model.checkpoint.model
        known = self._arguments.get(tokens_BT.shape)
        if known is None or layer == 0 or described.token_inputs:
            known = self._model.embed(tokens_BT, known)
            self._arguments[tokens_BT.shape] = known
        if layer == 0:
            return known
        batch = MicroBatch(known.hidden_BTD, known.arguments, known.parted().for_later)
        batch.take_up(
            {name: from_array(array, self._model.dtype) for name, array in before.items()}
            if before is not None
            else _saved_state(boundary_file(saved, number))
        )
        return batch

    def _note(self, layer: int, number: int, inputs: dict[str, Tensor]) -> None:
        for name, z_BTF in inputs.items():
            statistic = self._fits[layer, name][number >= self._num_training]
            statistic.update(z_BTF.flatten(0, -2))

    def fit(self, layer: int, name: str) -> Fits:
        """The finished statistics of a group, handed over.

        Raises:
            ModelError: an activation was not finite.
        """
        training, held_out = self._fits.pop((layer, name))
        for statistic in (training, held_out):
            check_finite(statistic, self._model, layer, self._groups[name])
        return training.finished(), held_out.finished()

    def passed(self, layer: int) -> list[Passed]:
        """What the layer was given, and has given or is to give, window by window, handed over."""
        return self._passed.pop(layer)


def _saved_state(file: Path) -> dict[str, Tensor]:
    """Hidden states that a wave has left; damaged ones are removed, so that a new attempt makes
    them again.

    Raises:
        VerificationError: they are not as they were written.
    """
    saved = read_sealed(file)
    if saved is None or HIDDEN not in saved:
        remove(file)
        raise VerificationError(
            f"{file}: was damaged while it was used, and is removed; run the same command again"
        )
    return saved
