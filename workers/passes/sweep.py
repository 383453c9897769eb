"""Calibration shards on their way through the layers: forward only, each weight used once, on the
already pruned path.

Per layer and coupled group: run to the consumer's input, add it to a statistic, stop. Once the cut
is decided, the block's output is the corrected projection of the kept units; the layer is entered
again behind it. Every step is a pure function of (layer, cuts below, tokens): what a `Sweep` holds
is a cache, rebuilt from saved hidden states or the tokens. Letters: S samples, T tokens, B windows
of a micro-batch, D hidden, F width of a consumer's input.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.description import Group
from rayprune.workers.model.places import Place
from rayprune.workers.network import layers
from rayprune.workers.network.micro_batch import HIDDEN, MicroBatch
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.numerics.statistics import RoutingStatistic, State, Statistic
from rayprune.workers.passes.sealed import read_sealed, write_sealed
from rayprune.workers.store.files import Manifest, read_manifest, remove
from rayprune.workers.store.layout import LAYER_FILE, Scope, layer_task
from rayprune.workers.store.shards import Node, grow_tree, owned_nodes

Parts = Mapping[Node, Statistic | State]
"""Statistics of nodes of the tree; or their states, where they come from another process or are
used more than once, since a decision uses statistics up.
"""
Routes = Mapping[Node, RoutingStatistic | State]
"""The same of experts."""
S = TypeVar("S", Statistic, RoutingStatistic)


def micro_batches(tokens_ST: Tensor, size: int) -> list[Tensor]:
    """Windows in groups of `size`, in order; the last group may be smaller."""
    return list(tokens_ST.split(size))


def embed_all(model: StreamedModel, batches: Sequence[Tensor]) -> list[MicroBatch]:
    """Embeddings of micro-batches; the layers' arguments are recorded once per shape."""
    embedded: dict[torch.Size, MicroBatch] = {}
    result = []
    for tokens_BT in batches:
        batch = model.embed(tokens_BT, embedded.get(tokens_BT.shape))
        embedded.setdefault(tokens_BT.shape, batch)
        result.append(batch)
    return result


def grow_statistics(
    trees: Sequence[Node], owned: tuple[int, int], leaf: Callable[[int], S]
) -> dict[Node, S]:
    """Statistics of the largest tree nodes that the owned shards cover."""
    nodes = [node for root in trees for node in owned_nodes(root, range(*owned))]
    return {
        node: grow_tree(node, leaf, lambda left, right: left.merge(right)).finished()
        for node in nodes
    }


@dataclass
class Shard:
    """One logical shard: its micro-batches stand before `layer`, and beside them, where drift is
    made up for, dense ones.

    Of a dense one `outputs[group]` is the residual stream behind that group's block of the layer.
    """

    layer: int
    batches: list[MicroBatch]
    dense: list[MicroBatch]


class Sweep:
    """The shards one worker has been asked for, and the layer it has loaded."""

    def __init__(
        self,
        model: StreamedModel,
        groups: Sequence[Mapping[str, Group]],
        statistic: Callable[[Group], Statistic],
        shards: Sequence[Sequence[Tensor]],
        scope: Scope,
        checkpoint_layers: int,
        keep_inputs: bool,
        drift: float,
        warn: Callable[[str], object],
    ) -> None:
        """`groups` are those of every layer, by name; `drift` is the fraction of the drift from the
        dense model that statistics hold as a target; `warn` tells the user something.
        """
        self._drift, self._warn = drift, warn
        self._model, self._statistic, self._tokens, self._scope = model, statistic, shards, scope
        self._groups = groups
        self._checkpoint_layers, self._keep_inputs = checkpoint_layers, keep_inputs
        self._shards: dict[int, Shard] = {}
        self._loaded: tuple[int, nn.Module] | None = None
        self._fewer: tuple[int, tuple[int, ...], nn.Module] | None = None

    def collect(
        self,
        layer: int,
        name: str,
        owned: tuple[int, int],
        cuts: Mapping[str, Cut],
        trees: Sequence[Node],
    ) -> dict[Node, Statistic]:
        """Statistics of a consumer's input over the shards `owned[0] ... owned[1] - 1`, one per
        largest tree node they cover.

        `cuts` are those of this layer's earlier groups.

        Raises:
            ModelError: an activation is not finite.
        """
        self._bring_to(layer, range(*owned))
        module, cuts = self._layer(layer, cuts), self._on_device(layer, cuts)
        return grow_statistics(
            trees, owned, lambda shard: self._shard_statistic(module, layer, shard, name, cuts)
        )

    def route(
        self, layer: int, owned: tuple[int, int], cuts: Mapping[str, Cut], trees: Sequence[Node]
    ) -> dict[Node, RoutingStatistic]:
        """Statistics of a layer's experts over the shards `owned[0] ... owned[1] - 1`, one per
        largest tree node they cover.

        Raises:
            ModelError: an activation is not finite.
        """
        self._bring_to(layer, range(*owned))
        module, cuts = self._layer(layer, cuts), self._on_device(layer, cuts)
        return grow_statistics(
            trees, owned, lambda shard: self._shard_routing(module, layer, shard, cuts)
        )

    def advance(self, layer: int, owned: tuple[int, int], cuts: Mapping[str, Cut]) -> None:
        """Take the owned shards past a layer, given the cuts of all its groups."""
        self._bring_to(layer, range(*owned))
        self._pass(layer, range(*owned), cuts)

    def _pass(self, layer: int, shards: Iterable[int], cuts: Mapping[str, Cut]) -> None:
        module, cuts = self._layer(layer, cuts), self._on_device(layer, cuts)
        for number in shards:
            self._advance(module, self._shards[number], cuts)
            self._save(number)

    def _on_device(self, layer: int, cuts: Mapping[str, Cut]) -> dict[str, Cut]:
        """Cuts for many micro-batches; those of experts, which are many, in their types on disk."""
        dtype, device = self._model.dtype, self._model.device
        groups = self._groups[layer]
        of_experts = {name for name in cuts if groups[name].expert is not None}
        return {
            name: cut.on(device, cut.weight_DK.dtype if name in of_experts else dtype)
            for name, cut in cuts.items()
        }

    def _shard_statistic(
        self, module: nn.Module, layer: int, shard: int, name: str, cuts: Mapping[str, Cut]
    ) -> Statistic:
        groups = self._groups[layer]
        statistic = self._statistic(groups[name])
        for number, batch in enumerate(self._shards[shard].batches):
            self._forget_from(layer, batch, name)
            self._apply(module, layer, batch, cuts)
            z_BTF = layers.consumer_input(module, layer, batch, groups, name)
            drift_BTD = self._drift_of(module, shard, number, name, z_BTF) if self._drift else None
            statistic.update(z_BTF.flatten(0, -2), drift_BTD)
            if not self._keep_inputs:
                batch.inputs.clear()
        check_finite(statistic, self._model, layer, groups[name], f" (shard {shard})")
        return statistic

    def _shard_routing(
        self, module: nn.Module, layer: int, shard: int, cuts: Mapping[str, Cut]
    ) -> RoutingStatistic:
        groups = self._groups[layer]
        group = groups["experts"]
        statistic = RoutingStatistic.empty(group.num_units)
        for batch in self._shards[shard].batches:
            self._forget_from(layer, batch, group.name)
            self._apply(module, layer, batch, cuts)
            layers.weigh_experts(module, layer, batch, groups, statistic)
        check_finite(statistic, self._model, layer, group, f" (shard {shard})")
        return statistic

    def _drift_of(
        self, module: nn.Module, shard: int, number: int, name: str, z_BTF: Tensor
    ) -> Tensor:
        """What the stream behind an uncut block would lack of the dense model's, as much of it as
        is to be made up for (tokens, D).
        """
        layer, batches, dense = (
            self._shards[shard].layer,
            self._shards[shard].batches,
            self._shards[shard].dense,
        )
        target_BTD = self._dense_streams(module, layer, dense[number])[name].to(z_BTF.device)
        group = self._groups[layer][name]
        before_BTD = layers.stream_before(batches[number], self._groups[layer], name)
        output_BTD = layers.project(module, group, z_BTF)
        scale = group.block.scale or 1.0
        lacks_BTD = (target_BTD.float() - before_BTD.float()) / scale - output_BTD.float()
        return (self._drift * lacks_BTD).flatten(0, -2)

    def _dense_streams(self, module: nn.Module, layer: int, dense: MicroBatch) -> dict[str, Tensor]:
        if not dense.outputs:
            dense.outputs = layers.dense_streams(module, layer, dense, self._groups[layer])
        return dense.outputs

    def _forget_from(self, layer: int, batch: MicroBatch, name: str) -> None:
        """Drop what an earlier attempt at this layer has left of this group and those behind it."""
        groups = self._groups[layer]
        names = list(groups)
        for later in names[names.index(name) :]:
            batch.outputs.pop(groups[later].block.module, None)
            batch.inputs.pop(later, None)
        if groups[name].expert is None:
            batch.routing = None

    def _apply(
        self, module: nn.Module, layer: int, batch: MicroBatch, cuts: Mapping[str, Cut]
    ) -> None:
        groups = self._groups[layer]
        for name, cut in cuts.items():
            group = groups[name]
            if group.kind == "experts" or group.block.module in batch.outputs:
                continue  # a layer of fewer experts is a module of its own
            if group.expert is None:
                layers.apply_cut(module, layer, batch, groups, name, cut)
            else:
                layers.apply_expert_cuts(module, layer, batch, groups, cuts)

    def _layer(self, index: int, cuts: Mapping[str, Cut]) -> nn.Module:
        """The layer, with the experts alone that `cuts` keep, if they say so."""
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = self._fewer = None  # free the old layer before the new one is read
            self._loaded = (index, self._model.load_layer(index))
        if "experts" not in cuts:
            return self._loaded[1]
        units = tuple(cuts["experts"].units.tolist())
        if self._fewer is None or self._fewer[:2] != (index, units):
            fewer = self._model.with_experts(index, self._loaded[1], units)
            self._fewer = (index, units, fewer)
        return self._fewer[2]

    def _bring_to(self, layer: int, owned: range) -> None:
        """Have the owned shards stand before `layer`, replaying finished layers where the cache is
        behind.
        """
        for shard in owned:
            if shard not in self._shards or self._shards[shard].layer > layer:
                self._shards[shard] = self._restored(shard, layer)
        while (behind := min(self._shards[shard].layer for shard in owned)) < layer:
            shards = [number for number in owned if self._shards[number].layer == behind]
            self._pass(behind, shards, self._finished_cuts(behind))

    def _manifest(self, layer: int) -> Manifest | None:
        """A layer's manifest, if it is finished; it must have been computed as this worker
        computes.
        """
        folder = self._scope.folder(layer_task(layer))
        if manifest := read_manifest(folder):
            check_computed_on(folder, manifest, self._model.computed_on)
        return manifest

    def _hidden_path(self, shard: int, layer: int) -> Path | None:
        """Where a shard's hidden states before `layer` are saved; the name holds what they depend
        on.
        """
        manifest = self._manifest(layer - 1)
        if manifest is None:
            return None
        return (
            self._scope.cache
            / f"shard-{shard:04d}"
            / f"layer-{layer:04d}-{manifest.sha256[:16]}.safetensors"
        )

    def _finished_cuts(self, layer: int) -> dict[str, Cut]:
        """The cuts of a finished layer."""
        manifest = self._manifest(layer)
        assert manifest is not None, f"layer {layer} is not finished"
        file = self._scope.folder(layer_task(layer)) / LAYER_FILE
        return read_cuts(file, manifest, self._groups[layer].values())

    def _advance(self, module: nn.Module, shard: Shard, cuts: Mapping[str, Cut]) -> None:
        for batch in shard.batches:
            self._apply(module, shard.layer, batch, cuts)
            layers.finish_layer(module, shard.layer, batch, self._groups[shard.layer])
        for dense in shard.dense:
            *_, dense.hidden_BTD = self._dense_streams(module, shard.layer, dense).values()
            dense.outputs = {}
        shard.layer += 1

    def _save(self, index: int) -> None:
        shard = self._shards[index]
        if not self._checkpoint_layers or shard.layer % self._checkpoint_layers:
            return
        if path := self._hidden_path(index, shard.layer):
            batches = [*shard.batches, *shard.dense]
            write_sealed(
                path,
                {
                    f"{number:05d}.{name}".removesuffix(f".{HIDDEN}"): tensor.contiguous()
                    for number, batch in enumerate(batches)
                    for name, tensor in batch.state().items()
                },
            )
            for old in path.parent.glob("layer-*.safetensors"):
                if old != path:
                    remove(old)

    def _restored(self, index: int, layer: int) -> Shard:
        batches, dense = (
            embed_all(self._model, self._tokens[index]) if wanted else []
            for wanted in (True, self._drift > 0)
        )
        for saved in range(layer, 0, -1):
            path = self._hidden_path(index, saved)
            if path is None or not path.exists():
                continue
            states = _by_batch(read_sealed(path) or {})
            if len(states) != len(batches) + len(dense):
                self._warn(f"{path}: is damaged or not of this run; its layers are computed again")
                continue
            for batch, (_, state) in zip([*batches, *dense], sorted(states.items()), strict=True):
                device = self._model.device
                batch.take_up({name: found.to(device, copy=True) for name, found in state.items()})
            return Shard(saved, batches, dense)
        return Shard(0, batches, dense)


def _by_batch(saved: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The states in a file, by the numbers of their micro-batches."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        number, _, rest = name.partition(".")
        states.setdefault(number, {})[rest or HIDDEN] = tensor
    return states


def check_finite(
    statistic: Statistic | RoutingStatistic,
    model: StreamedModel,
    layer: int,
    group: Group,
    where: str = "",
) -> None:
    """Check what a group's consumer was given.

    Raises:
        ModelError: some of it is not finite, or too large for its squares to be.
    """
    if not statistic.is_finite():
        raise ModelError(
            f"layer {layer}, {group.name}: input of {group.consumer.module} is not finite{where};"
            f" {model.not_finite}"
        )


def check_computed_on(folder: Path, manifest: Manifest, computed_on: str) -> None:
    """Check that a finished task was computed as this worker computes.

    Raises:
        SpecError: it was on another kind of device or in another type; mixing them would mix
            roundings.
    """
    # a random mask is not computed
    if manifest.info.get("computed_on", computed_on) != computed_on:
        raise SpecError(
            f"{folder}: was computed on {manifest.info['computed_on']}, this worker computes on"
            f" {computed_on}; set parallel.device and model.dtype as they were, or give --redo"
            " stale"
        )


def read_cuts(file: Path, manifest: Manifest, groups: Iterable[Group]) -> dict[str, Cut]:
    """The cuts of a finished layer, from its file (which may be padded) and manifest."""
    kept: Any = manifest.info["kept"]
    consumers: Any = manifest.info["consumers"]
    cuts = {}
    for group in (group for group in groups if group.name in kept):
        units, weight_DK = torch.tensor(kept[group.name], dtype=torch.int64), torch.empty(0)
        if len(units) and group.kind != "experts":
            with safe_open(file, framework="pt") as handle:
                found = consumers[group.name]
                place = Place(found) if isinstance(found, str) else Place(**found)
                weight = place.of(handle.get_tensor(place.name))
            weight_DF = weight.T if group.consumer.transposed else weight
            weight_DK = weight_DF[:, : len(units) * group.columns].clone()
        cuts[group.name] = Cut(group.name, units, weight_DK)
    return cuts
