"""The experts of a layer, each a module of its own, so that what one reads can be looked at, its
weights stay in their mapped files, and some of them can be left out.

In transformers they are packed into tensors of all experts; here matrices have the description's
names. Which tokens an expert gets, and its activation, are the stock modules' own. Letters: T
tokens, D hidden, k experts of a token, n tokens of one expert, F channels of an expert.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.workers.model.description import Group


@dataclass(frozen=True)
class Routing:
    """What the experts of a layer are given: tokens, and for each its experts and their weights."""

    hidden_TD: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor
    numbers: tuple[int, ...]
    """The experts that were to choose from: their numbers in the whole layer."""

    def of(self, place: int) -> tuple[Tensor, Tensor]:
        """The numbers of the tokens of one expert, and its weights for them (n)."""
        chosen_n, tokens_n = torch.where(self.experts_Tk.T.eq(place))
        return tokens_n, self.weights_Tk[tokens_n, chosen_n]

    def with_shares(self) -> "Routing":
        """The same with weights that sum to 1 for every token."""
        shares_Tk = self.weights_Tk / self.weights_Tk.sum(1, keepdim=True)
        return replace(self, weights_Tk=shares_Tk)


class Gate:
    """The activation of stock experts, which reads gate and up as one tensor."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __deepcopy__(self, memo: object) -> "Gate":
        return self

    def __call__(self, gate_nF: Tensor, up_nF: Tensor) -> Tensor:
        """The input of down (n, F)."""
        together = (
            torch.cat([gate_nF, up_nF], -1)
            if self._stock.is_concatenated
            else torch.stack([gate_nF, up_nF], -1).flatten(-2)
        )
        result: Tensor = self._stock._apply_gate(together)
        return result


Inner = Callable[[Tensor, Tensor], Tensor]
"""What makes of gate and up (n, F) the input of down."""


def _gated_by(activation: Callable[[Tensor], Tensor]) -> Inner:
    return lambda gate_nF, up_nF: up_nF * activation(gate_nF)


class Expert(nn.Module):
    """One expert: a gated FFN."""

    def __init__(self, hidden: int, width: int, bias: bool, gate: Inner) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias)
        self.up_proj = nn.Linear(hidden, width, bias)
        self.down_proj = nn.Linear(width, hidden, bias)
        self._gate = gate

    def inner(self, x_nD: Tensor) -> Tensor:
        """The input of its down projection (n, F)."""
        return self._gate(self.gate_proj(x_nD), self.up_proj(x_nD))

    def forward(self, x_nD: Tensor) -> Tensor:
        """Its output (n, D)."""
        output_nD: Tensor = self.down_proj(self.inner(x_nD))
        return output_nD


class Experts(nn.ModuleList):
    """All experts of a layer; computes what the stock module computes one expert at a time."""

    def __init__(self, experts: Sequence[Expert], numbers: Sequence[int]) -> None:
        """`numbers` are those that the experts have in the whole layer."""
        super().__init__(experts)
        self.numbers = tuple(numbers)

    def forward(self, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Their outputs, each times its weight, added for every token (T, D)."""
        routing = Routing(hidden_TD, experts_Tk, weights_Tk, self.numbers)
        return self.summed(routing, lambda place, x_nD: self[place](x_nD))

    def summed(self, routing: Routing, output: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The weighted sum of what `output` gives for the tokens of every expert (T, D)."""
        sum_TD = torch.zeros_like(routing.hidden_TD)
        for place in range(len(self)):
            tokens_n, weights_n = routing.of(place)
            if len(tokens_n):
                output_nD = output(place, routing.hidden_TD[tokens_n])
                weighted_nD = output_nD * weights_n[:, None]
                sum_TD.index_add_(0, tokens_n, weighted_nD.to(sum_TD.dtype))
        return sum_TD

    def input_of(self, routing: Routing, expert: int) -> Tensor:
        """The input of one expert's down projection for its tokens, each times its weight (n, F).

        The layer's output is a weighted sum, so an error of an expert counts as much as its weight.
        """
        place = self.numbers.index(expert)
        tokens_n, weights_n = routing.of(place)
        found = self[place]
        assert isinstance(found, Expert)
        z_nF = found.inner(routing.hidden_TD[tokens_n])
        return (z_nF * weights_n[:, None]).to(z_nF.dtype)


class WeighedInput(nn.Module):
    """A stock block whose router's weight multiplies what a token's one expert is given."""

    def __init__(self, stock: Any, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = stock.router, experts
        self.shared_expert = stock.shared_expert

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B * T, D), and the router's logits."""
        hidden_TD = hidden_BTD.flatten(0, -2)
        weights_TE, logits_TE = self.router(hidden_TD)
        weights_T1, experts_T1 = weights_TE.max(1, keepdim=True)  # the others' are 0
        output_TD = self.experts(hidden_TD * weights_T1, experts_T1, torch.ones_like(weights_T1))
        return self.shared_expert(hidden_TD) + output_TD, logits_TE


def with_own_experts(
    layer: nn.Module, group: Group | None, numbers: Sequence[int] | None = None
) -> nn.Module:
    """The layer with its stock experts replaced, in place; `numbers` are those that they have in
    the whole layer. A layer without any stays as it is.
    """
    if group is None:
        return layer
    stock: Any = layer.get_submodule(group.block.module)
    count, *shape = stock.down_proj.shape
    # the stock experts of blocks that weigh the input say nothing of their layout
    transposed = group.weighs_input or stock.is_transposed
    width, hidden = shape if transposed else reversed(shape)
    biased = not group.weighs_input and stock.has_bias
    gate = _gated_by(stock.act_fn) if group.weighs_input else Gate(stock)
    with torch.device("meta"):
        experts = [Expert(hidden, width, biased, gate) for _ in range(count)]
    own = Experts(experts, range(count) if numbers is None else numbers).requires_grad_(False)
    if group.weighs_input:
        block = group.block.module.rpartition(".")[0]
        layer.set_submodule(block, WeighedInput(layer.get_submodule(block), own))
    else:
        layer.set_submodule(group.block.module, own)
    return layer


def changed_config(config: Any, sizes: Mapping[str, object]) -> Any:
    """A stock config with other sizes."""
    changed = copy(config)
    for name, value in sizes.items():
        setattr(changed, name, value)
    return changed
