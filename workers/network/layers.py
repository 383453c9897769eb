"""Passes through one living layer: up to a consumer, past a block that is known, to its end, back.

Letters: B windows of a micro-batch, T tokens, D hidden, F width of a consumer's input.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rayprune.workers.model.description import Block, Group
from rayprune.workers.network.experts import Experts, Routing
from rayprune.workers.network.mapped import put_weight
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import hooked, output_of, returned
from rayprune.workers.numerics.linalg import unit_rows
from rayprune.workers.numerics.statistics import RoutingStatistic


# no error: it ends a forward pass that has served its purpose
class _CaughtInput(Exception):  # noqa: N818
    def __init__(self, values: tuple[Tensor, ...]) -> None:
        self.values = values


class _Catch(nn.Module):
    weight = None
    """T5 asks for its type."""

    def forward(self, *values: Tensor) -> Tensor:
        """End the pass with the values that arrived."""
        raise _CaughtInput(values)


class Constant(nn.Module):
    """Stands for a block whose output (B, T, D) is known."""

    def __init__(self, output: Tensor, block: Block) -> None:
        super().__init__()
        self.output, self.block = output, block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A copy of the known output, whatever comes in: some layers add to it in place."""
        del args, kwargs
        output = self.output.flatten(0, 1) if self.block.flat else self.output
        return returned(output.clone(), self.block.returns)


@contextmanager
def _swapped(layer: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: layer.get_submodule(name) for name in replacements}
    for name, module in replacements.items():
        layer.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in originals.items():
            layer.set_submodule(name, module)


def _run(layer: nn.Module, index: int, batch: MicroBatch, swaps: Mapping[str, nn.Module]) -> Tensor:
    args, kwargs = batch.arguments[index]
    hidden_BTD = batch.hidden_BTD.to(_device(layer))  # once swapped it may have no parameters left
    with _swapped(layer, swaps):
        return output_of(layer(hidden_BTD, *args, **{**kwargs, **batch.for_later}))


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _known_blocks(
    layer: nn.Module, groups: Mapping[str, Group], batch: MicroBatch
) -> dict[str, nn.Module]:
    known = [group.block for group in groups.values() if group.block.module in batch.outputs]
    device = _device(layer)
    return {b.module: Constant(batch.outputs[b.module].to(device), b) for b in known}


@contextmanager
def _outputs_noted(
    layer: nn.Module, groups: Mapping[str, Group], batch: MicroBatch
) -> Iterator[None]:
    """Note the output of every block that runs for real, so that it runs once."""

    def noting(block: Block) -> Callable[[nn.Module, Any, Any], None]:
        def _note(module: nn.Module, args: Any, output: Any) -> None:
            # a copy: some layers go on with it in place
            output_BTD = output_of(output).clone().view_as(batch.hidden_BTD)
            batch.outputs[block.module] = batch.store(output_BTD)

        return _note

    blocks = {g.block for g in groups.values() if g.block.module not in batch.outputs}
    found = [(layer.get_submodule(block.module), block) for block in blocks]
    with hooked([module.register_forward_hook(noting(block)) for module, block in found]):
        yield


@torch.inference_mode()
def consumer_input(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group], name: str
) -> Tensor:
    """Input (B, T, F) of a group's consumer; the layer runs up to there, blocks with a known output
    not at all. That of an expert: (n, F) of the tokens it gets, each times the expert's weight.

    Raises:
        RuntimeError: the layer never reached the consumer.
    """
    group = groups[name]
    if group.expert is not None:
        routing = routed(layer, index, batch, groups)
        return experts_of(layer, group).input_of(routing, group.expert)
    if name not in batch.inputs:
        (value,) = _caught(layer, index, batch, groups, group.consumer.module)
        batch.inputs[name] = _by_window(value, batch)
    return batch.inputs[name]


def _caught(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group], module: str
) -> tuple[Tensor, ...]:
    """What a module is given; the layer runs up to there."""
    swaps = _known_blocks(layer, groups, batch) | {module: _Catch()}
    try:
        with _outputs_noted(layer, groups, batch):
            _run(layer, index, batch, swaps)
    except _CaughtInput as caught:
        return caught.values
    raise RuntimeError(f"layer {index} never called {module}")


def experts_of(layer: nn.Module, group: Group) -> Experts:
    """The experts whose group, or the group of one of which, this is."""
    experts = layer.get_submodule(group.block.module)
    assert isinstance(experts, Experts)
    return experts


@torch.inference_mode()
def routed(layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group]) -> Routing:
    """What a layer's experts are given; the layer runs up to there, once."""
    group = groups["experts"]
    numbers = experts_of(layer, group).numbers
    if batch.routing is None or batch.routing.numbers != numbers:
        hidden_TD, experts_Tk, weights_Tk = _caught(layer, index, batch, groups, group.block.module)
        batch.routing = Routing(batch.store(hidden_TD), experts_Tk, weights_Tk, numbers)
    return replace(batch.routing, hidden_TD=batch.routing.hidden_TD.to(_device(layer)))


def _by_window(z: Tensor, batch: MicroBatch) -> Tensor:
    """A consumer's input as (B, T, F): some layers flatten it."""
    return z.view(*batch.hidden_BTD.shape[:2], -1)


def stream_before(batch: MicroBatch, groups: Mapping[str, Group], name: str) -> Tensor:
    """The residual stream (B, T, D) to which a group's block adds its output; earlier blocks'
    outputs must be known.
    """
    stream_BTD = batch.hidden_BTD
    for earlier in list(groups)[: list(groups).index(name)]:
        block = groups[earlier].block
        stream_BTD = _added(stream_BTD, batch.outputs[block.module], block)
    return stream_BTD


def _added(stream_BTD: Tensor, output_BTD: Tensor, block: Block) -> Tensor:
    """The stream behind a block."""
    assert block.scale is not None, f"the output of {block.module} is not added as it is"
    return stream_BTD + (output_BTD if block.scale == 1 else output_BTD * block.scale)


@torch.inference_mode()
def dense_streams(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group]
) -> dict[str, Tensor]:
    """The residual stream (B, T, D) behind every group's block of the unchanged layer, by group, in
    one pass; stored.
    """
    passing = MicroBatch(batch.hidden_BTD, batch.arguments)
    with _outputs_noted(layer, groups, passing):
        output_BTD = _run(layer, index, passing, {})
    streams: dict[str, Tensor] = {}
    stream_BTD = batch.hidden_BTD.to(output_BTD.device)
    *before, last = groups
    for name in before:
        block = groups[name].block
        stream_BTD = _added(stream_BTD, passing.outputs[block.module], block)
        streams[name] = batch.store(stream_BTD)
    return streams | {last: batch.store(output_BTD)}


@torch.inference_mode()
def apply_cut(
    layer: nn.Module,
    index: int,
    batch: MicroBatch,
    groups: Mapping[str, Group],
    name: str,
    cut: Cut,
) -> None:
    """Set the block's output to the corrected projection of the kept units, zeros if none is; the
    consumer's input is dropped. A cut for many micro-batches should be `on` the layer's device.
    """
    group = groups[name]
    if len(cut.units) == 0:
        batch.outputs[group.block.module] = batch.store(torch.zeros_like(batch.hidden_BTD))
        batch.inputs.pop(name, None)
        return
    z_BTF = consumer_input(layer, index, batch, groups, name)
    cut = cut.on(z_BTF.device, z_BTF.dtype)
    columns = unit_rows(cut.units, group.columns)
    bias = layer.get_submodule(group.consumer.module)._parameters["bias"]
    # of a matrix: 8 times faster than z_BTF[..., columns]
    kept_TK = z_BTF.flatten(0, -2).index_select(1, columns)
    output_TD = nn.functional.linear(kept_TK, cut.weight_DK, bias)
    batch.outputs[group.block.module] = batch.store(output_TD.unflatten(0, z_BTF.shape[:2]))
    del batch.inputs[name]


@torch.inference_mode()
def compute_block(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group], name: str
) -> None:
    """Set the output of a group's block to what its consumer makes of its input, which is
    dropped.
    """
    output_BTD = project(layer, groups[name], consumer_input(layer, index, batch, groups, name))
    batch.outputs[groups[name].block.module] = batch.store(output_BTD)
    del batch.inputs[name]


def with_weights(layer: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A layer with other matrices, by their names in it, for passes in a type; the rest is that of
    the first one, not copied.
    """
    shared = {id(tensor): tensor for tensor in chain(layer.parameters(), layer.buffers())}
    other = deepcopy(layer, shared)
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        put_weight(other.get_submodule(module), leaf, weight.to(_device(layer)), dtype)
    return other


@torch.inference_mode()
def weigh_experts(
    layer: nn.Module,
    index: int,
    batch: MicroBatch,
    groups: Mapping[str, Group],
    statistic: RoutingStatistic,
) -> None:
    """Add what a layer's experts give for a micro-batch to a statistic."""
    routing = routed(layer, index, batch, groups)
    experts, shares = experts_of(layer, groups["experts"]), routing.with_shares()
    for place, number in enumerate(experts.numbers):
        (tokens_n, weights_n), (_, shares_n) = routing.of(place), shares.of(place)
        if len(tokens_n):
            output_nD = experts[place](routing.hidden_TD[tokens_n])
            statistic.update(number, output_nD, weights_n, shares_n)


@torch.inference_mode()
def apply_expert_cuts(
    layer: nn.Module,
    index: int,
    batch: MicroBatch,
    groups: Mapping[str, Group],
    cuts: Mapping[str, Cut],
) -> None:
    """Set the output of a layer's experts to the weighted sum of the corrected projections of the
    units that each keeps.
    """
    routing = routed(layer, index, batch, groups)
    by_expert = {group.expert: cuts[name] for name, group in groups.items() if name in cuts}
    experts = experts_of(layer, groups["experts"])

    def output(place: int, x_nD: Tensor) -> Tensor:
        expert: Any = experts[place]
        z_nF = expert.inner(x_nD)
        cut = by_expert[experts.numbers[place]].on(z_nF.device, z_nF.dtype)
        kept_nK = z_nF.index_select(1, cut.units)
        return nn.functional.linear(kept_nK, cut.weight_DK, expert.down_proj._parameters["bias"])

    output_BTD = experts.summed(routing, output).view(batch.hidden_BTD.shape)
    batch.outputs[groups["experts"].block.module] = batch.store(output_BTD)
    batch.routing = None


@torch.inference_mode()
def project(layer: nn.Module, group: Group, z_BTF: Tensor) -> Tensor:
    """The uncut block's output (B, T, D) for an input of its consumer."""
    output: Tensor = layer.get_submodule(group.consumer.module)(z_BTF)
    return output


@torch.inference_mode()
def finish_layer(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group]
) -> None:
    """Move the hidden states past the layer; only what no block output stands for is computed."""
    batch.hidden_BTD = batch.store(_run(layer, index, batch, _known_blocks(layer, groups, batch)))
    batch.inputs.clear()
    batch.outputs.clear()
    batch.routing = None


@contextmanager
def _inputs_noted(layer: nn.Module, groups: Mapping[str, Group]) -> Iterator[dict[str, Tensor]]:
    """Note the input of every group's consumer."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: inputs.update({name: args[0]})

    found = [(layer.get_submodule(g.consumer.module), g.name) for g in groups.values()]
    with hooked([module.register_forward_pre_hook(hook(name)) for module, name in found]):
        yield inputs


@contextmanager
def _routing_noted(layer: nn.Module, groups: Mapping[str, Group]) -> Iterator[list[Routing]]:
    """Note what the experts are given, where some of these groups are theirs."""
    noted: list[Routing] = []

    def note(module: Any, args: Any) -> None:
        noted.append(Routing(args[0], args[1], args[2], module.numbers))

    modules = {layer.get_submodule(g.block.module) for g in groups.values()}
    with hooked([module.register_forward_pre_hook(note) for module in modules]):
        yield noted


@torch.inference_mode()
def dense_pass(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group]
) -> dict[str, Tensor]:
    """Move the hidden states past the unchanged layer and return the input of every group's
    consumer (B, T, F), of an expert (n, F) as `consumer_input` does.
    """
    plain = {name: group for name, group in groups.items() if group.expert is None}
    of_experts = {name: group for name, group in groups.items() if group.expert is not None}
    with _inputs_noted(layer, plain) as inputs, _routing_noted(layer, of_experts) as noted:
        batch.hidden_BTD = batch.store(_run(layer, index, batch, {}))
    found = {name: _by_window(z, batch) for name, z in inputs.items()}
    for name, group in of_experts.items():
        assert group.expert is not None
        found[name] = experts_of(layer, group).input_of(noted[0], group.expert)
    return found


def backward(
    layer: nn.Module, index: int, batch: MicroBatch, groups: Mapping[str, Group], behind_BTD: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the loss's gradient behind an unchanged layer those before it and, by group, at its
    consumers' inputs (B, T, F).
    """
    # autograd takes none from inference mode
    arguments = {index: pytree.tree_map_only(Tensor, torch.clone, batch.arguments[index])}
    given_BTD = batch.hidden_BTD.to(_device(layer), copy=True).requires_grad_()
    with _inputs_noted(layer, groups) as inputs:
        output_BTD = _run(layer, index, MicroBatch(given_BTD, arguments), {})
    before_BTD, *found = torch.autograd.grad(output_BTD, [given_BTD, *inputs.values()], behind_BTD)
    by_window = [_by_window(gradient, batch) for gradient in found]
    return before_BTD, dict(zip(inputs, by_window, strict=True))
