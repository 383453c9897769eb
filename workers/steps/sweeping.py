"""Steps of the pruned path: statistics of a group, and the decision made from them."""

from collections.abc import Sequence
from functools import partial

import torch

from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.correction import Correction
from rayprune.workers.passes.sweep import Parts, Routes, Sweep
from rayprune.workers.steps.deciding import Deciding
from rayprune.workers.steps.step import Cached, Droppable, Receipt, drop_all, step
from rayprune.workers.store.shards import roots
from rayprune.workers.workbench import Workbench


class Sweeping:
    """The pruned path, group by group."""

    def __init__(self, bench: Workbench, deciding: Deciding, before: Sequence[Droppable]) -> None:
        self._bench, self._deciding, self._before = bench, deciding, before
        self._sweep = Cached(self._new_sweep)
        self._job = bench.job

    def drop(self) -> None:
        """Forget hidden states, inputs and statistics of the pruned path."""
        self._sweep.drop()

    def _new_sweep(self) -> Sweep:
        drift = self._job.correction.drift
        drift_width = self._bench.checkpoint.model.hidden if drift else 0
        return Sweep(
            self._bench.model,
            [layer.members for layer in self._bench.checkpoint.model.layers],
            partial(self._bench.statistic, self._job.calibration.samples, drift_width=drift_width),
            self._bench.shards(),
            self._bench.scope,
            self._job.memory.checkpoint_layers,
            self._bench.memory.keep_inputs,
            drift,
            self._bench.warnings.append,
        )

    @step
    def collect(
        self, layer: int, group: str, owned: tuple[int, int], *cuts: Cut
    ) -> tuple[Receipt, Parts]:
        """Statistics of a group's consumer input over some calibration shards; `cuts` are this
        layer's earlier ones.
        """
        drop_all(self._before)
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        return {}, self._sweep.value.collect(layer, group, owned, _by_group(cuts), trees)

    @step
    def route(self, layer: int, owned: tuple[int, int], *cuts: Cut) -> tuple[Receipt, Routes]:
        """Statistics of a layer's experts over some calibration shards; `cuts` are this layer's
        earlier ones.
        """
        drop_all(self._before)
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        return {}, self._sweep.value.route(layer, owned, _by_group(cuts), trees)

    @step
    def keep_experts(self, num_kept: int, *parts: Routes) -> tuple[Receipt, Cut]:
        """Choose the experts of a layer that stay."""
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        cut, summary = self._deciding.keep_experts(num_kept, trees, parts)
        return {"group": summary}, cut

    @step
    def advance(self, layer: int, owned: tuple[int, int], *cuts: Cut) -> tuple[Receipt, None]:
        """Take some calibration shards past a layer of which all groups are decided; its file need
        not be there yet.
        """
        self._sweep.value.advance(layer, owned, _by_group(cuts))
        return {}, None

    @step
    def decide(self, layer: int, group: str, num_kept: int, *parts: Parts) -> tuple[Receipt, Cut]:
        """Select the units of a group that stay (or take those of the selection pass) and correct
        the consumer's weight. The statistics are used up.

        Where none stays no statistics are needed.
        """
        if num_kept == 0:
            nothing = torch.empty(0)
            correction = Correction(nothing, 0.0, 1.0, 1.0)
            return {"group": self._deciding.summary(group, 0, correction)}, Cut(
                group, torch.arange(0), nothing
            )
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        fits = self._deciding.merged(trees, parts)
        is_cut = num_kept < self._bench.groups[group].num_units
        units = (
            self._deciding.selected(layer, group) if is_cut and self._job.selects_first else None
        )
        tokens = fits[0].num_tokens + fits[1].num_tokens  # they are used up
        cut, correction = self._deciding.cut(layer, group, num_kept, fits, units)
        summary = self._deciding.summary(group, num_kept, correction)
        routed = self._bench.groups[group].expert is not None
        return {"group": summary | ({"tokens": tokens} if routed else {})}, cut

    @step
    def reduce(self, *parts: Parts) -> tuple[Receipt, Parts]:
        """Merge statistics of several workers as far as the tree over the shards allows."""
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        return {}, {
            node: fit
            for tree in trees
            for node, fit in self._deciding.siblings(tree, parts).items()
        }


def _by_group(cuts: Sequence[Cut]) -> dict[str, Cut]:
    return {cut.group: cut for cut in cuts}
