"""The sweep of calibration shards where matrices get zeros and no unit goes: site by site, every
site on what the sparse ones before it leave.

A layer is run with the sparse matrices in place up to what the next site reads; the output of a
block whose last site is decided is computed once and then stands in for the block. Letters: D
outputs, F inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from rayprune.workers.model.sites import Site
from rayprune.workers.network import layers
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.numerics.statistics import Statistic
from rayprune.workers.passes.sweep import Sweep
from rayprune.workers.store.layout import LAYER_FILE, Scope, layer_task


class SparseArrays(TypedDict):
    """`SparseSite` on its way from process to process."""

    site: str
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class SparseSite:
    """The decision for one site of one layer: its matrices as the files will have them, by their
    names in the layer. They stay where they were made until they leave their process.
    """

    site: str
    weights: Mapping[str, Tensor]

    def __reduce__(self) -> tuple[Callable[[SparseArrays], "SparseSite"], tuple[SparseArrays]]:
        return SparseSite.from_arrays, (self.arrays(),)

    def arrays(self) -> SparseArrays:
        """As it travels between processes: fp32 holds every 16-bit type exactly."""
        wide = {name: weight.to("cpu", torch.float32) for name, weight in self.weights.items()}
        return {"site": self.site, "weights": {name: w.numpy() for name, w in wide.items()}}

    @classmethod
    def from_arrays(cls, arrays: SparseArrays) -> "SparseSite":
        """Rebuild what `arrays` wrote, in memory of its own."""
        return cls(arrays["site"], {n: torch.tensor(w) for n, w in arrays["weights"].items()})


Decisions = Mapping[str, SparseSite]


class SparseSweep(Sweep):
    """A sweep whose groups are sites, and whose cuts are sparse matrices."""

    def __init__(
        self,
        model: StreamedModel,
        sites: Mapping[str, Site],
        decided: Sequence[str],
        statistic: Callable[[Any], Statistic],
        shards: Sequence[Sequence[Tensor]],
        scope: Scope,
        checkpoint_layers: int,
        keep_inputs: bool,
        warn: Callable[[str], object],
    ) -> None:
        """`decided` are the sites that get zeros."""
        reads = {site.input.name: site.input for site in sites.values()}
        every = [reads] * model.checkpoint.num_layers
        super().__init__(
            model, every, statistic, shards, scope, checkpoint_layers, keep_inputs, 0.0, warn
        )
        self._sites, self._decided = sites, decided
        self._sparse: tuple[int, tuple[str, ...], nn.Module] | None = None

    def _on_device(self, layer: int, cuts: Mapping[str, Any]) -> dict[str, Any]:
        return dict(cuts)  # `_layer` puts them in place

    def _layer(self, index: int, cuts: Mapping[str, Any]) -> nn.Module:
        """The layer with the sparse matrices in place."""
        layer = super()._layer(index, {})
        if not cuts:
            return layer
        if self._sparse is None or self._sparse[:2] != (index, tuple(cuts)):
            self._sparse = None
            weights = {n: weight for cut in cuts.values() for n, weight in cut.weights.items()}
            put = layers.with_weights(layer, weights, self._model.dtype)
            self._sparse = (index, tuple(cuts), put)
        return self._sparse[2]

    def _apply(
        self, module: nn.Module, layer: int, batch: MicroBatch, cuts: Mapping[str, Any]
    ) -> None:
        """Compute the blocks whose last site is decided; what decided ones have read is dropped."""
        for name in cuts:
            site = self._sites[name]
            if site.ends_block and site.input.block.module not in batch.outputs:
                layers.compute_block(module, layer, batch, self._groups[layer], name)
            batch.inputs.pop(name, None)

    def _finished_cuts(self, layer: int) -> dict[str, Any]:
        """The sparse matrices of a finished layer, as its file has them."""
        assert self._manifest(layer) is not None, f"layer {layer} is not finished"
        file = self._scope.folder(layer_task(layer)) / LAYER_FILE
        prefix = self._model.checkpoint.model.prefix(layer)
        found = {}
        with safe_open(file, framework="pt") as handle:
            for name in self._decided:
                names = self._sites[name].weights
                weights = {weight: handle.get_tensor(prefix + weight) for weight in names}
                found[name] = SparseSite(name, weights)
        return found
