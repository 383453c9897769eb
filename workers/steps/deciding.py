"""Choose the units of a group that stay, and correct the weight that reads them."""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rayprune.specs.calibration import FEW_TOKENS
from rayprune.specs.job import CorrectionSpec
from rayprune.workers.model.description import Group
from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.correction import (
    NOT_CORRECTED,
    Correction,
    JudgedFit,
    correct,
    refitted,
    uncorrected,
)
from rayprune.workers.numerics.damping import Rest, Trial
from rayprune.workers.numerics.linalg import row_slices, unit_rows
from rayprune.workers.numerics.methods import select
from rayprune.workers.numerics.statistics import RoutingStatistic, Statistic, best_experts, restored
from rayprune.workers.passes.stream import Fits
from rayprune.workers.passes.survey import plain_cut
from rayprune.workers.passes.sweep import Parts, Routes, check_computed_on
from rayprune.workers.steps.step import Receipt
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import GRADIENTS_FILE, GRADIENTS_TASK, selection_task
from rayprune.workers.store.shards import Node, even_parts, merge_siblings
from rayprune.workers.workbench import Workbench


class Deciding:
    """Selection and correction of one group, from its statistics."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._job = bench.job

    def merged(self, trees: tuple[Node, Node], parts: Sequence[Parts]) -> Fits:
        """The training and the held-out statistic of all shards, from the parts workers have."""
        training, held_out = (self.siblings(tree, parts)[tree] for tree in trees)
        return training, held_out

    def siblings(self, tree: Node, parts: Sequence[Parts]) -> dict[Node, Statistic]:
        """Statistics of the nodes of a tree, merged as far as the parts allow."""
        under = (
            (node, statistic)
            for part in parts
            for node, statistic in part.items()
            if tree[0] <= node[0] and node[1] <= tree[1]
        )
        rebuilt = {node: restored(found, self._bench.scratch) for node, found in under}
        return {
            node: fit.finished()
            for node, fit in merge_siblings(
                tree, rebuilt, lambda left, right: left.merge(right)
            ).items()
        }

    def routing(
        self, trees: tuple[Node, Node], parts: Sequence[Routes]
    ) -> tuple[RoutingStatistic, RoutingStatistic]:
        """What was seen of a layer's experts in the training and in the held-out shards."""
        nodes = {
            node: RoutingStatistic.from_state(found) if isinstance(found, dict) else found
            for part in parts
            for node, found in part.items()
        }
        training, held_out = (
            merge_siblings(
                tree,
                {n: found for n, found in nodes.items() if tree[0] <= n[0] and n[1] <= tree[1]},
                lambda left, right: left.merge(right),
            )[tree]
            for tree in trees
        )
        return training, held_out

    def keep_experts(
        self, num_kept: int, trees: tuple[Node, Node], parts: Sequence[Routes]
    ) -> tuple[Cut, Receipt]:
        """The experts that stay, and the decision as reports have it: their numbers, and of all
        experts tokens and scores.
        """
        group, score = self._bench.groups["experts"], self._job.budget.expert_score
        training, held_out = self.routing(trees, parts)
        whole = training.merge(held_out)
        scores_E = whole.scores(score)
        units = best_experts(scores_E, num_kept, group.parts)
        receipt: Receipt = {
            "kept": num_kept,
            "of": group.num_units,
            "damping": 0.0,
            "training_error": training.lost(units.tolist()),
            "held_out_error": held_out.lost(units.tolist()),
            "units": units.tolist(),
            "tokens_by_expert": whole.tokens_E.tolist(),
            "scores": scores_E.tolist(),
        }
        return Cut(group.name, units, torch.empty(0)), receipt

    def summary(self, group: str, num_kept: int, correction: Correction) -> Receipt:
        """A decision, as reports have it."""
        return {
            "kept": num_kept,
            "of": self._bench.groups[group].num_units,
            "damping": correction.damping,
            "training_error": correction.training_error,
            "held_out_error": correction.held_out_error,
        }

    def select(self, layer: int, name: str, num_kept: int, training: Statistic) -> Tensor:
        """Units that stay, ascending; a group that stays or goes whole needs no ranking."""
        if num_kept in (0, self._bench.groups[name].num_units):
            return torch.arange(num_kept)
        return select(
            self._job.method.selector,
            training,
            self.ranked_by(layer, name),
            self._bench.groups[name].columns,
            num_kept,
        )

    def selected(self, layer: int, name: str) -> Tensor:
        """Units that stay, by the layer's own selection pass."""
        manifest = read_manifest(self._bench.scope.folder(selection_task(layer)))
        assert manifest is not None, f"layer {layer} has no selection"
        kept: Any = manifest.info["result"]
        return torch.tensor(kept[name])

    @torch.inference_mode()
    def cut(
        self, layer: int, name: str, num_kept: int, fits: Fits, units: Tensor | None = None
    ) -> tuple[Cut, Correction]:
        """The units that stay (selected, unless given) and the corrected weight that reads them."""
        group = self._bench.groups[name]
        weight_DF = self._bench.consumer_weight(layer, group)
        dtype = self._bench.disk_dtype(weight_DF)
        if group.expert is not None and not fits[0].num_tokens:
            cut = plain_cut(name, num_kept, weight_DF, dtype)
            columns_K = unit_rows(cut.units, group.columns).to(self._bench.device)
            return cut, uncorrected(fits[1], weight_DF, columns_K, dtype)
        units = self.select(layer, name, num_kept, fits[0]) if units is None else units
        columns_K = unit_rows(units, group.columns).to(self._bench.device)
        options = self.damped_for(group, fits)
        correction = correct(*fits, weight_DF, columns_K, options, dtype)
        return Cut(name, units, correction.weight_DK), correction

    @torch.inference_mode()
    def share(
        self,
        layer: int,
        name: str,
        num_kept: int,
        fits: Fits,
        units: Tensor | None,
        part: tuple[int, int],
    ) -> "Share":
        """The first of `cut` for some outputs alone: of `part[1]` parts of their blocks the one
        with the number `part[0]`.
        """
        group, (index, count) = self._bench.groups[name], part
        weight_DF = self._bench.consumer_weight(layer, group)
        units = self.select(layer, name, num_kept, fits[0]) if units is None else units
        blocks = list(row_slices(len(weight_DF), self._bench.device))
        mine = [blocks[number] for number in even_parts(len(blocks), count)[index]]
        rows = slice(mine[0].start, mine[-1].stop) if mine else slice(0)
        training, held_out = (fit.of_outputs(rows) for fit in fits)
        columns_K = unit_rows(units, group.columns).to(self._bench.device)
        dtype = self._bench.disk_dtype(weight_DF)
        return Share(name, units, (training, held_out), weight_DF[rows], columns_K, dtype)

    def damped_for(self, group: Group, fits: Fits) -> CorrectionSpec:
        """How a group is corrected. Of an expert that has seen few tokens held-out ones may also
        say that it is not, which they do where there are none.
        """
        options = self._job.correction
        tokens = fits[0].num_tokens + fits[1].num_tokens
        enough = group.expert is None or tokens >= FEW_TOKENS * group.num_units
        if enough or options.damping != "held-out":
            return options
        return options.model_copy(update={"candidates": (*options.candidates, NOT_CORRECTED)})

    def ranked_by(self, layer: int, name: str) -> Tensor:
        """What gives a group's columns their scale: the consumer's weight (D, F), or the gradients
        at its input as one row (1, F).
        """
        if not self._job.gradient_windows:
            return self._bench.consumer_weight(layer, self._bench.groups[name])
        folder = self._bench.scope.folder(GRADIENTS_TASK)
        manifest = read_manifest(folder)
        assert manifest is not None, "gradients are not measured"
        check_computed_on(folder, manifest, self._bench.model.computed_on)
        with safe_open(folder / GRADIENTS_FILE, framework="pt") as handle:
            row_1F: Tensor = handle.get_slice(name)[layer : layer + 1]
        return row_1F.to(self._bench.device)


class Share:
    """Some of the outputs of a group's correction, while a damping is looked for."""

    def __init__(
        self,
        group: str,
        units: Tensor,
        fits: Fits,
        weight_BF: Tensor,
        columns_K: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._group, self._units, self._dtype = group, units, dtype
        self._fits, self._weight_BF, self._columns_K = fits, weight_BF, columns_K
        # a worker without outputs has nothing to fit
        self._fit = JudgedFit.of(*fits, weight_BF, columns_K) if len(weight_BF) else None

    @torch.inference_mode()
    def rest(self) -> Rest:
        """What no damping changes."""
        return self._fit.rest() if self._fit else Rest((), (), (), ())

    @torch.inference_mode()
    def trial(self, damping: float) -> Trial:
        """A damping, judged by these outputs.

        Raises:
            ModelError: it is too small to solve with.
        """
        return self._fit.trial(damping) if self._fit else Trial(damping, (), ())

    @torch.inference_mode()
    def cut(self, damping: float) -> Cut:
        """These rows of the corrected weight; the statistics are used up."""
        if self._fit is None:
            return Cut(self._group, self._units, torch.empty(0, len(self._columns_K)))
        self._fit = None  # its memory
        weight_BK = refitted(*self._fits, self._weight_BF, self._columns_K, damping, self._dtype)
        return Cut(self._group, self._units, weight_BK)
