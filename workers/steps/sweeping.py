"""Steps of the pruned path: statistics of a group, and the decision made from them."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch

from rayprune.workers.machine.peers import Peers, open_store
from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.correction import Correction
from rayprune.workers.numerics.statistics import Statistic
from rayprune.workers.passes.stream import Fits
from rayprune.workers.passes.sweep import Parts, Routes, Sweep
from rayprune.workers.steps.deciding import Deciding, Share
from rayprune.workers.steps.exchange import summed
from rayprune.workers.steps.step import Cached, Droppable, Receipt, drop_all, step
from rayprune.workers.store.shards import Node, roots
from rayprune.workers.workbench import Workbench


class Sweeping:
    """The pruned path, group by group."""

    def __init__(self, bench: Workbench, deciding: Deciding, before: Sequence[Droppable]) -> None:
        self._bench, self._deciding, self._before = bench, deciding, before
        self._sweep = Cached(self._new_sweep)
        self._share: Share | None = None
        self._held: dict[Node, Statistic] = {}
        self._store: object = None
        self._peers: Peers | None = None
        self._job = bench.job

    def drop(self) -> None:
        """Forget hidden states, inputs and statistics of the pruned path."""
        self._sweep.drop()
        self._share, self._held = None, {}

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
        return {}, self._collected(layer, group, owned, cuts)

    def _collected(
        self, layer: int, group: str, owned: tuple[int, int], cuts: Sequence[Cut]
    ) -> dict[Node, Statistic]:
        drop_all(self._before)
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        return self._sweep.value.collect(layer, group, owned, _by_group(cuts), trees)

    @step
    def open_group(self, host: str) -> tuple[Receipt, None]:
        """Open a place where workers find each other, at this address of the machine."""
        self._store = store = open_store(host)
        return {"address": [store.host, store.port]}, None

    @step
    def join_group(self, address: tuple[str, int], rank: int, count: int) -> tuple[Receipt, None]:
        """Meet the other workers there."""
        self._peers = None  # its connections
        self._peers = Peers(address, rank, count, self._bench.device)
        return {}, None

    @step
    def hold(
        self, layer: int, group: str, owned: tuple[int, int], *cuts: Cut
    ) -> tuple[Receipt, None]:
        """`collect`, with statistics that stay here until the group sums them."""
        self._held = {}  # of an attempt that has failed
        self._held = self._collected(layer, group, owned, cuts)
        return {}, None

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
        fits, units = self._fits(parts), self._selected(layer, group, num_kept)
        tokens = fits[0].num_tokens + fits[1].num_tokens  # they are used up
        cut, correction = self._deciding.cut(layer, group, num_kept, fits, units)
        summary = self._deciding.summary(group, num_kept, correction)
        routed = self._bench.groups[group].expert is not None
        return {"group": summary | ({"tokens": tokens} if routed else {})}, cut

    def _fits(self, parts: Sequence[Parts]) -> Fits:
        trees = roots(self._job.calibration.shards, self._job.calibration.held_out_shards)
        return self._deciding.merged(trees, parts)

    def _summed(self) -> Fits:
        """What all workers hold together."""
        assert self._peers is not None, "no group was joined"
        held, self._held = self._held, {}
        num_shards = self._job.calibration.shards
        trees = roots(num_shards, self._job.calibration.held_out_shards)
        training, held_out = (
            summed(tree, held, num_shards, self._peers, self._bench.scratch) for tree in trees
        )
        return training, held_out

    def _selected(self, layer: int, group: str, num_kept: int) -> torch.Tensor | None:
        """Units that a selection pass has chosen, if there was one."""
        is_cut = num_kept < self._bench.groups[group].num_units
        chosen = is_cut and self._job.selects_first
        return self._deciding.selected(layer, group) if chosen else None

    @step
    def begin_share(
        self, layer: int, group: str, num_kept: int, part: tuple[int, int], *parts: Parts
    ) -> tuple[Receipt, None]:
        """Begin a decision that workers share by the outputs of the weight that is corrected: its
        number among so many parts says which are this worker's. Without statistics it is by those
        that the workers hold.
        """
        self._share = None  # its memory
        fits = self._fits(parts) if parts else self._summed()
        units = self._selected(layer, group, num_kept)
        self._share = self._deciding.share(layer, group, num_kept, fits, units, part)
        return {"rest": asdict(self._share.rest())}, None

    @step
    def try_damping(self, damping: float) -> tuple[Receipt, None]:
        """What this worker's outputs say of a damping."""
        assert self._share is not None, "no decision is shared"
        return {"trial": asdict(self._share.trial(damping))}, None

    @step
    def end_share(self, damping: float) -> tuple[Receipt, Cut]:
        """This worker's rows of the corrected weight. The statistics are used up."""
        assert self._share is not None, "no decision is shared"
        share, self._share = self._share, None
        return {}, share.cut(damping)

    @step
    def join(self, summary: Receipt, *cuts: Cut) -> tuple[Receipt, Cut]:
        """The cut of all outputs; `summary` is its decision as reports have it."""
        weights = [cut.weight_DK for cut in cuts if len(cut.weight_DK)]
        whole = Cut(cuts[0].group, cuts[0].units, torch.cat(weights))
        return {"group": summary}, whole

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
