"""What a training minimises beside the language-model loss: penalties on what is to go, gates on layers, a teacher.

Letters: B windows, T tokens, D hidden, V vocabulary, U units of a coupled group, L layers.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from workers.families import UnitGroup
from workers.finetune_stage import Norm

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor up over the ranks."""


class Objective:
    """The language-model loss alone: the base of every other objective."""

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Change the model where the objective needs it; the parameters to train."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def losses(self, model: nn.Module, batch_BT: Tensor) -> dict[str, Tensor]:
        """The terms of the loss on some windows, means over their tokens, by name."""
        return {"lm": model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss}

    def add_gradients(self, model: nn.Module, summed: Sum) -> dict[str, float]:
        """Add the gradients of terms that depend on weights alone, in closed form; the terms' values, by name."""
        del model, summed
        return {}

    def release(self, model: nn.Module) -> None:
        """Take back what `prepare` changed in the model's structure."""


@dataclass(frozen=True)
class _Part:
    """The part of a parameter that this rank holds: `index_N` says which unit each of its rows (or columns, `dim` 1) belongs to."""

    parameter: nn.Parameter
    dim: int
    index_N: Tensor

    @property
    def values(self) -> Tensor:
        return local_part(self.parameter.data)

    def per_unit(self, amounts: Tensor, units: int) -> Tensor:
        """Amounts, one for each of this rank's numbers, summed by unit; fp64."""
        along_N = amounts.double().reshape(len(amounts), -1).sum(1) if self.dim == 0 else amounts.double().sum(0)
        return along_N.new_zeros(units).index_add_(0, self.index_N, along_N)

    def spread(self, by_unit_U: Tensor) -> Tensor:
        """One factor for each row or column."""
        factors_N = by_unit_U[self.index_N]
        return factors_N.view(-1, *[1] * (self.values.dim() - 1)) if self.dim == 0 else factors_N


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_row(parameter: nn.Parameter) -> int:
    """Number of the first row that this rank holds: FSDP2 cuts rows into chunks of equal size, the last ones smaller."""
    if not isinstance(parameter.data, DTensor):
        return 0
    mesh = parameter.data.device_mesh
    return min(mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size()), parameter.shape[0])


def group_parts(layer: nn.Module, group: UnitGroup) -> list[_Part]:
    """Everything in a layer that goes with the units of a group: rows (and bias entries) of producers, columns of the consumer."""
    parts = []
    for producer in group.producers:
        for parameter in layer.get_submodule(producer.module).parameters():
            first, device = _first_row(parameter), local_part(parameter.data).device
            rows_N = torch.arange(first, first + len(local_part(parameter.data)), device=device)
            parts.append(_Part(parameter, 0, rows_N // producer.rows))
    consumer = layer.get_submodule(group.consumer).get_parameter("weight")
    columns_F = torch.arange(group.width, device=local_part(consumer.data).device) // group.columns
    return [*parts, _Part(consumer, 1, columns_F)]


class GroupPenalty(Objective):
    """DReSS (arXiv 2501.17905): the weights of the units that will go are driven towards zero, so that others take over.

    strength x sum over these units of |w| (l2: over all weights of the unit together; l1: the sum of all of them). A unit's
    norm is over all its matrices at once. Scaling up_proj down and down_proj up by the same factor changes nothing in the
    network, and never brings the penalty below twice the product of the two norms: it cannot be dodged, though it is not
    invariant itself.
    """

    def __init__(
        self, groups: Mapping[str, UnitGroup], removed: Sequence[Mapping[str, Collection[int]]], strength: float, norm: Norm
    ) -> None:
        """`removed`: for every layer and group the units that will go."""
        self._groups, self._removed, self._strength, self._norm = groups, removed, strength, norm

    def layers(self, model: Any) -> list[nn.Module]:
        """The decoder layers of what is trained."""
        return list(model.model.layers)

    def _penalised(self, model: nn.Module) -> Iterator[tuple[list[_Part], Tensor]]:
        for layer, removed in zip(self.layers(model), self._removed, strict=True):
            for name, units in removed.items():
                parts = group_parts(layer, self._groups[name])
                mask_U = torch.zeros(self._groups[name].num_units, dtype=torch.float64, device=parts[0].index_N.device)
                mask_U[list(units)] = 1.0
                yield parts, mask_U

    def add_gradients(self, model: nn.Module, summed: Sum) -> dict[str, float]:
        """The penalty's value, its gradient added; at zero the gradient is taken as zero."""
        total = 0.0
        for parts, mask_U in self._penalised(model):
            square = self._norm == "l2"
            amounts = [part.per_unit(part.values.square() if square else part.values.abs(), len(mask_U)) for part in parts]
            sizes_U = summed(torch.stack(amounts).sum(0))
            sizes_U = sizes_U.sqrt() if square else sizes_U
            total += float((sizes_U * mask_U).sum())
            factors_U = self._strength * mask_U / (torch.where(sizes_U > 0, sizes_U, 1.0) if square else 1.0)
            for part in parts:
                assert part.parameter.grad is not None
                direction = part.values if square else part.values.sign()
                local_part(part.parameter.grad).add_(direction * part.spread(factors_U).to(direction.dtype))
        return {"penalty": self._strength * total}


class Watched(nn.Module):
    """A decoder layer x + f(x) with a gate on its update, x + gate f(x), that notes how large the update is."""

    def __init__(self, inner: nn.Module, gate: nn.Parameter | None = None, norm: Norm | None = None) -> None:
        super().__init__()
        self.inner, self.norm = inner, norm
        self.register_parameter("gate", gate)
        self.update: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The gated layer; a gate that is not trained is at 0 and the layer is left out."""
        gate = self._parameters["gate"]
        if gate is not None and not gate.requires_grad:
            return hidden
        update_BTD: Tensor = self.inner(hidden, *args, **kwargs) - hidden
        if self.norm:
            wide_BTD = update_BTD.to(torch.promote_types(update_BTD.dtype, torch.float32))
            self.update = (wide_BTD.abs().sum(-1) if self.norm == "l1" else wide_BTD.norm(dim=-1)).mean()
        return hidden + (update_BTD if gate is None else gate.to(update_BTD.dtype) * update_BTD)


class LayerGates(Objective):
    """TRSP, stage 1 (arXiv 2505.18232): a gate on every layer's update is trained, strength x sum |gate| on top; weights are frozen."""

    def __init__(self, gates: Sequence[float], removed: Collection[int], strength: float) -> None:
        """Gates to begin with; those of `removed` layers stay at 0."""
        self._initial, self._removed, self._strength = gates, removed, strength

    def prepare(self, model: Any) -> list[nn.Parameter]:
        """Freeze the model and put a gate on every layer."""
        model.requires_grad_(False)
        device = next(model.parameters()).device
        for index, layer in enumerate(model.model.layers):
            trained = index not in self._removed
            value = torch.tensor(self._initial[index] if trained else 0.0, device=device)
            model.model.layers[index] = Watched(layer, nn.Parameter(value, requires_grad=trained))
        return [gate for index, gate in enumerate(self._gates(model)) if index not in self._removed]

    def _gates(self, model: Any) -> list[Any]:
        return [layer.gate for layer in model.model.layers]

    def losses(self, model: nn.Module, batch_BT: Tensor) -> dict[str, Tensor]:
        """The language-model loss and the penalty on the gates."""
        return super().losses(model, batch_BT) | {"penalty": self._strength * torch.stack(self._gates(model)).abs().sum()}

    def values(self, model: nn.Module) -> list[float]:
        """All gates as they are now."""
        return [float(gate.detach()) for gate in self._gates(model)]

    def release(self, model: Any) -> None:
        """Take the gates off."""
        _unwatch(model)


class UpdatePenalty(Objective):
    """TRSP, stage 2: all weights are trained; strength x sum over the layers that will go of |x_out - x_in|, mean over tokens."""

    def __init__(self, removed: Collection[int], strength: float, norm: Norm) -> None:
        self._removed, self._strength, self._norm = sorted(removed), strength, norm

    def prepare(self, model: Any) -> list[nn.Parameter]:
        """Watch the layers that will go."""
        for index in self._removed:
            model.model.layers[index] = Watched(model.model.layers[index], norm=self._norm)
        return super().prepare(model)

    def losses(self, model: Any, batch_BT: Tensor) -> dict[str, Tensor]:
        """The language-model loss and the penalty on the updates."""
        parts = super().losses(model, batch_BT)
        updates = [model.model.layers[index].update for index in self._removed]
        return parts | {"penalty": self._strength * torch.stack(updates).sum()}

    def release(self, model: Any) -> None:
        """Stop watching."""
        _unwatch(model)


class Distillation(Objective):
    """Recovery from a teacher, the dense model: KL of the next-token distributions, and how far the last hidden states lie apart."""

    def __init__(self, teacher: nn.Module, hidden: float) -> None:
        """`hidden` weighs the squared relative distance of the last hidden states."""
        self._teacher, self._hidden = teacher.eval().requires_grad_(False), hidden

    def losses(self, model: Any, batch_BT: Tensor) -> dict[str, Tensor]:
        """KL(teacher, student), mean over tokens, and the distance."""
        states: list[Tensor] = []
        handles = [m.model.norm.register_forward_hook(lambda _, args, out: states.append(out)) for m in (self._teacher, model)]  # type: ignore[union-attr]
        with torch.no_grad():
            log_p = torch.log_softmax(self._teacher(input_ids=batch_BT, use_cache=False).logits.float(), -1)
        log_q = torch.log_softmax(model(input_ids=batch_BT, use_cache=False).logits.float(), -1)
        for handle in handles:
            handle.remove()
        parts = {"divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean()}
        if self._hidden:
            goal, found = (state.float() for state in states)
            parts["hidden"] = self._hidden * (found - goal).square().sum() / goal.square().sum()
        return parts


def _unwatch(model: Any) -> None:
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer, Watched):
            model.model.layers[index] = layer.inner
