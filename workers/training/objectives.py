"""What a training minimises beside the language-model loss: penalties on what is to go, gates on
layers.

Letters: B windows, T tokens, D hidden, V vocabulary, U units of a coupled group, L layers.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayprune.specs.training import Norm
from rayprune.workers.model.description import Axis, Group, Model
from rayprune.workers.network.building import layers_of
from rayprune.workers.network.streamed import output_of, returned
from rayprune.workers.store.training_stage import Removed

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over the ranks."""
ROWS_AT_ONCE = 256
"""Rows of a matrix whose squares are formed together."""


class Objective:
    """The language-model loss alone: the base of every other objective."""

    def __init__(self, described: Model, loss: "Objective | None" = None) -> None:
        """`described`: what is trained; `loss`: what is minimised in place of the language-model
        loss.
        """
        self.described, self._loss = described, loss

    def layers(self, model: nn.Module) -> Any:
        """The layers of what is trained, in place."""
        return layers_of(model, self.described)

    def prepare(self, model: nn.Module, summed: Sum) -> list[nn.Parameter]:
        """Change the model where the objective needs it; the parameters to train."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def losses(self, model: nn.Module, batch_BT: Tensor) -> dict[str, Tensor]:
        """The terms of the loss on some windows, means over their tokens, by name."""
        if self._loss:
            return self._loss.losses(model, batch_BT)
        return {"lm": model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss}

    def before_batch(self, numbers: Sequence[int]) -> None:
        """Be told which windows the next losses are asked of."""

    def before_step(self, done: float) -> None:
        """What changes in the course of a training: `done` is the part of the sum of all learning
        rates that has been.
        """

    def after_step(self, share: float, summed: Sum) -> dict[str, float]:
        """Follow a step of the optimizer, `share` of the sum of all learning rates, for terms of
        weights alone; their values, by name.
        """
        del share, summed
        return {}

    def release(self, model: Any) -> None:
        """Take back what `prepare` changed in the model's structure."""
        layers = self.layers(model)
        for index, layer in enumerate(layers):
            if isinstance(layer, Watched):
                layers[index] = layer.inner


@dataclass(frozen=True)
class _Part:
    """Entries `first` and following along axis `dim` of what this rank holds of a parameter:
    `index_N` says which unit each of them belongs to.
    """

    parameter: nn.Parameter
    dim: int
    first: int
    index_N: Tensor

    @property
    def values(self) -> Tensor:
        held = local_part(self.parameter.data)
        return held.narrow(self.dim, self.first, len(self.index_N))

    def per_unit(self, amount: Callable[[Tensor], Tensor], units: int) -> Tensor:
        """An amount of every weight, summed by unit in fp64; a few rows at a time, so that nothing
        as large as the matrix is made.
        """
        sums = [
            amount(rows).double()[..., None].flatten(1).sum(1 - self.dim)
            for rows in self.values.split(ROWS_AT_ONCE)
        ]
        along_N = torch.cat(sums) if self.dim == 0 else torch.stack(sums).sum(0)
        return along_N.new_zeros(units).index_add_(0, self.index_N, along_N)

    def spread(self, by_unit_U: Tensor) -> Tensor:
        """One factor for each row or column."""
        factors_N = by_unit_U[self.index_N]
        return factors_N.view(-1, *[1] * (self.values.dim() - 1)) if self.dim == 0 else factors_N


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Number of the first row that this rank holds: FSDP2 cuts rows into chunks of equal size, the
    last ones smaller.
    """
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return min(mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])


def group_parts(layer: nn.Module, group: Group) -> list[_Part]:
    """Everything in a layer that goes with the units of a group, along its axes and the
    consumer's inputs.
    """
    parameters = dict(layer.named_parameters())
    return [_part(parameters[a.tensor], a, group.num_units) for a in group.all_axes]


def _part(parameter: nn.Parameter, axis: Axis, num_units: int) -> _Part:
    held = local_part(parameter.data)
    begin = first_row(parameter.data) if axis.dim == 0 else 0
    stop = begin + held.shape[axis.dim]
    first = min(max(axis.start, begin), stop)
    last = max(first, min(axis.start + num_units * axis.per_unit, stop))
    numbers_N = torch.arange(first, last, device=held.device)
    return _Part(parameter, axis.dim, first - begin, (numbers_N - axis.start) // axis.per_unit)


@dataclass(frozen=True)
class _Going:
    """Units of one group of one layer that will go: all their weights, and their norms at first; 0
    for units that stay.
    """

    parts: list[_Part]
    initial_U: Tensor
    count_U: Tensor

    def per_unit(self, amount: Callable[[Tensor], Tensor], summed: Sum) -> Tensor:
        """An amount of every weight, summed over each unit."""
        return summed(
            torch.stack([part.per_unit(amount, len(self.initial_U)) for part in self.parts]).sum(0)
        )


class GroupPenalty(Objective):
    """DReSS (arXiv 2501.17905): the weights of the units that will go are driven to zero, so that
    others take over.

    P(w) = sum over these units of |w0_u| |w_u|, with w_u all weights of a unit at once and w0_u
    what they were at first (l2); or a_u |w_u|_1, with a_u the mean |w| of w0_u (l1). The optimizer
    does not see P: after each of its steps comes P's proximal map, of step c = strength x learning
    rate / sum of all learning rates. For l2, |w_u| falls by c |w0_u|, not below 0; for l1, every
    |w| by c a_u. So with strength 1 a unit that nothing else moves is gone just at the end (l2).
    Adam would scale P's gradient as it does the loss's, to steps that depend on neither's size;
    this is to P what AdamW is to weight decay (ProxGen, Yun et al. 2021).

    A norm is over all of a unit's matrices at once. Scaling up_proj down and down_proj up by the
    same factor changes nothing in the network, and never brings it below sqrt(2 |up| |down|): it
    cannot be dodged, though it is not invariant itself.
    """

    def __init__(
        self,
        described: Model,
        removed: Sequence[Removed],
        strength: float,
        norm: Norm,
        loss: Objective | None = None,
    ) -> None:
        """`removed`: for every layer and group the units that will go."""
        super().__init__(described, loss)
        self._removed, self._strength, self._norm = removed, strength, norm
        self._groups = {group.name: group for group in described.groups}
        self._going: list[_Going] = []

    def prepare(self, model: nn.Module, summed: Sum) -> list[nn.Parameter]:
        """Find the units' weights, and measure them."""
        for layer, removed in zip(self.layers(model), self._removed, strict=True):
            for name, units in removed.items():
                group = self._groups[name]
                parts = group_parts(layer, group)
                nothing_U = torch.zeros(
                    group.num_units, dtype=torch.float64, device=parts[0].index_N.device
                )
                going = _Going(parts, nothing_U, nothing_U)
                mask_U = nothing_U.index_fill(
                    0, torch.tensor(list(units), dtype=torch.int64, device=nothing_U.device), 1.0
                )
                count_U = going.per_unit(torch.ones_like, summed)
                self._going.append(
                    replace(going, initial_U=mask_U * self._sizes(going, summed), count_U=count_U)
                )
        return super().prepare(model, summed)

    def _sizes(self, going: _Going, summed: Sum) -> Tensor:
        return (
            going.per_unit(torch.square, summed).sqrt()
            if self._norm == "l2"
            else going.per_unit(torch.abs, summed)
        )

    def after_step(self, share: float, summed: Sum) -> dict[str, float]:
        """The proximal map; what is left of the units before it, times strength. Nothing where none
        will go.
        """
        if not self._going:
            return {}
        left = first = 0.0
        for going in self._going:
            sizes_U = self._sizes(going, summed)
            left += float(sizes_U[going.initial_U > 0].sum())
            first += float(going.initial_U.sum())
            self._shrink(going, sizes_U, self._strength * share)
        return {"penalty": self._strength * left / (first or 1.0)}

    def _shrink(self, going: _Going, sizes_U: Tensor, step: float) -> None:
        steps_U = step * going.initial_U
        factors_U = 1 - torch.where(sizes_U > 0, steps_U / sizes_U, 0.0).clamp_max(1.0)
        for part in going.parts:
            if self._norm == "l2":
                part.values.mul_(part.spread(factors_U).to(part.values.dtype))
            else:
                least = part.spread(steps_U / going.count_U).to(part.values.dtype)
                part.values.sub_(part.values.clamp(-least, least))


class Watched(nn.Module):
    """A decoder layer x + f(x) whose update is scaled, x + gate scale f(x), and which notes how
    large it is.

    How large: the sum over a window's tokens of |f(x_t)|, over the square root of their number. It
    is the norm of the whole window's update where all tokens are alike, but not ruled by a few
    tokens with massive activations where they are not. Mean over the windows.
    """

    def __init__(
        self,
        inner: nn.Module,
        returns: int,
        gate: nn.Parameter | None = None,
        norm: Norm | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.inner, self.norm, self.scale, self.returns = inner, norm, scale, returns
        self.register_parameter("gate", gate)
        self.update: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The scaled layer; at 0 it is left out."""
        if self.scale == 0:
            return returned(hidden, self.returns)
        update_BTD = output_of(self.inner(hidden, *args, **kwargs)) - hidden
        if self.norm:
            wide_BTD = update_BTD.to(torch.promote_types(update_BTD.dtype, torch.float32))
            sizes_BT = wide_BTD.abs().sum(-1) if self.norm == "l1" else wide_BTD.norm(dim=-1)
            self.update = sizes_BT.mean() * sizes_BT.shape[1] ** 0.5
        gate = self._parameters["gate"]
        scaled_BTD = update_BTD if self.scale == 1 else self.scale * update_BTD
        if gate is not None:
            scaled_BTD = gate.to(update_BTD.dtype) * scaled_BTD
        return returned(hidden + scaled_BTD, self.returns)


class LayerGates(Objective):
    """TRSP, stage 1 (arXiv 2505.18232): a gate on every layer's update is trained, strength x sum
    |gate| on top; weights are frozen.
    """

    def __init__(
        self,
        described: Model,
        gates: Sequence[float],
        removed: Collection[int],
        strength: float,
        loss: Objective | None = None,
    ) -> None:
        """Gates to begin with; those of `removed` layers stay at 0."""
        super().__init__(described, loss)
        self._initial, self._removed, self._strength = gates, removed, strength

    def prepare(self, model: Any, summed: Sum) -> list[nn.Parameter]:
        """Freeze the model and put a gate on every layer."""
        model.requires_grad_(False)
        device = next(model.parameters()).device
        layers, returns = self.layers(model), self.described.layer_returns
        for index, layer in enumerate(layers):
            stays = index not in self._removed
            gate = nn.Parameter(torch.tensor(self._initial[index], device=device))
            layers[index] = Watched(layer, returns, gate if stays else None, scale=float(stays))
        return self._gates(model)

    def _gates(self, model: Any) -> list[Any]:
        return [layer.gate for layer in self.layers(model) if layer.gate is not None]

    def losses(self, model: nn.Module, batch_BT: Tensor) -> dict[str, Tensor]:
        """The loss and the penalty on the gates."""
        return super().losses(model, batch_BT) | {
            "penalty": self._strength * torch.stack(self._gates(model)).abs().sum()
        }

    def values(self, model: Any) -> list[float]:
        """All gates as they are now; 0 where a layer is left out."""
        return [
            0.0 if layer.gate is None else float(layer.gate.detach())
            for layer in self.layers(model)
        ]


class UpdatePenalty(Objective):
    """TRSP, stage 2: all weights are trained; strength x sum over the layers that will go of |x_out
    - x_in| (`Watched`).
    """

    def __init__(
        self,
        described: Model,
        removed: Collection[int],
        strength: float,
        norm: Norm,
        loss: Objective | None = None,
    ) -> None:
        super().__init__(described, loss)
        self._removed, self._strength, self._norm = sorted(removed), strength, norm

    def prepare(self, model: Any, summed: Sum) -> list[nn.Parameter]:
        """Watch the layers that will go."""
        layers, returns = self.layers(model), self.described.layer_returns
        for index in self._removed:
            layers[index] = Watched(layers[index], returns, norm=self._norm)
        return super().prepare(model, summed)

    def losses(self, model: Any, batch_BT: Tensor) -> dict[str, Tensor]:
        """The loss and the penalty on the updates."""
        parts = super().losses(model, batch_BT)
        updates = [self.layers(model)[index].update for index in self._removed]
        return parts | {"penalty": self._strength * torch.stack(updates).sum()}


class UpdateShrink(Objective):
    """TRSP, stage 2, decoupled: all weights are trained on the loss alone, while the layers that
    will go fade.

    x_in + scale (x_out - x_in), scale = 1 - strength x the part of the sum of all learning rates
    that has been, not below 0: the proximal map of the penalty on the updates, as `GroupPenalty`
    has one for weights. From where the scale is 0, at the latest, what is trained is the model
    without these layers: leaving them out then changes nothing.
    """

    def __init__(
        self,
        described: Model,
        removed: Collection[int],
        strength: float,
        loss: Objective | None = None,
    ) -> None:
        super().__init__(described, loss)
        self._removed, self._strength = sorted(removed), strength
        self._watched: list[Watched] = []

    def prepare(self, model: Any, summed: Sum) -> list[nn.Parameter]:
        """Watch the layers that will go."""
        layers, returns = self.layers(model), self.described.layer_returns
        for index in self._removed:
            self._watched.append(Watched(layers[index], returns))
            layers[index] = self._watched[-1]
        return super().prepare(model, summed)

    def before_step(self, done: float) -> None:
        """Scale the updates."""
        for layer in self._watched:
            layer.scale = max(0.0, 1.0 - self._strength * done)

    def after_step(self, share: float, summed: Sum) -> dict[str, float]:
        """The scale."""
        return {"scale": self._watched[0].scale}
