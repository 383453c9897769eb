"""Steps of the sparse path: statistics of what a site reads, the zeros of its matrices made from
them, and the layer's file.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch

from rayprune.specs.methods.options import Masks
from rayprune.workers.model.sites import Site, sites_of
from rayprune.workers.network.written import narrowed
from rayprune.workers.network.zeros import check_zeros, zeros_of
from rayprune.workers.numerics.sparsity import sparsify
from rayprune.workers.passes.sparse import SparseSite, SparseSweep
from rayprune.workers.passes.sweep import Parts
from rayprune.workers.steps.deciding import Deciding
from rayprune.workers.steps.step import Cached, Receipt, step
from rayprune.workers.steps.writing import Writing
from rayprune.workers.store.files import Task
from rayprune.workers.store.shards import roots
from rayprune.workers.workbench import Workbench


class Sparsifying:
    """Zeros, site by site."""

    def __init__(self, bench: Workbench, deciding: Deciding, writing: Writing) -> None:
        self._bench, self._deciding, self._writing = bench, deciding, writing
        self._sweep = Cached(self._new_sweep)
        self._job = bench.job

    def drop(self) -> None:
        """Forget hidden states and statistics of the sparse path."""
        self._sweep.drop()

    @property
    def _masks(self) -> Masks:
        masks = self._job.method.masks
        assert masks is not None, f"method {self._job.method.name} makes no zeros"
        return masks

    @cached_property
    def _sites(self) -> dict[str, Site]:
        return sites_of(self._bench.checkpoint.model)

    def _new_sweep(self) -> SparseSweep:
        return SparseSweep(
            self._bench.model,
            self._sites,
            self._masks.sites,
            partial(self._bench.statistic, self._job.calibration.samples),
            self._bench.shards(),
            self._bench.scope,
            self._job.memory.checkpoint_layers,
            self._bench.memory.keep_inputs,
            self._bench.warnings.append,
        )

    @step
    def collect_site(
        self, layer: int, site: str, owned: tuple[int, int], *before: SparseSite
    ) -> tuple[Receipt, Parts]:
        """Statistics of what a site reads over some calibration shards; `before` are this layer's
        earlier ones.
        """
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        decided: dict[str, Any] = {each.site: each for each in before}
        return {}, self._sweep.value.collect(layer, site, owned, decided, trees)

    @step
    @torch.inference_mode()
    def decide_site(self, layer: int, site: str, *parts: Parts) -> tuple[Receipt, SparseSite]:
        """Make the zeros of a site's matrices. The statistics are used up."""
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        fits = self._deciding.merged(trees, parts)
        names, turned = self._sites[site].weights, self._sites[site].transposed
        tensors = self._bench.layer_tensors(layer, names)
        found = [tensors[name] for name in names]
        weights = [weight.T if turned else weight for weight in found]
        dtypes = [self._bench.disk_dtype(weight) for weight in found]
        made = sparsify(*fits, weights, self._masks, dtypes)
        result = {
            name: (weight.T if turned else weight).contiguous()
            for name, weight in zip(names, made.weights, strict=True)
        }
        receipt: Receipt = {
            "kept": sum(int(weight.count_nonzero()) for weight in made.weights),
            "of": sum(weight.numel() for weight in made.weights),
            "damping": self._masks.damping,
            "training_error": made.training_error,
            "held_out_error": made.held_out_error,
            "mask_error": made.mask_error,
        }
        return {"group": receipt}, SparseSite(site, result)

    @step
    def write_sparse_layer(
        self, layer: int, task: Task, groups: Mapping[str, Receipt], *decided: SparseSite
    ) -> tuple[Receipt, None]:
        """Write a layer's tensors with the sparse matrices of its sites, and its manifest."""
        bench, prefix = self._bench, self._bench.checkpoint.model.prefix(layer)
        tensors = bench.layer_tensors(layer)
        sparse = {name: weight for each in decided for name, weight in each.weights.items()}
        written = {
            prefix + name: narrowed(
                (sparse.get(name, tensor)).to("cpu"), bench.disk_dtype(tensor), prefix + name
            ).contiguous()
            for name, tensor in tensors.items()
        }
        zeros = {}
        for site in (self._sites[each.site] for each in decided):
            for name in (prefix + weight for weight in site.weights):
                told = zeros_of(written[name], site.transposed)
                check_zeros(written[name], told, self._masks.group, self._masks.sparsity, name)
                zeros[name] = asdict(told)
        info = {"groups": groups, "zeros": zeros}
        self._writing.whole_layer(task, layer, written, info)
        return {}, None
