"""Steps that find out what layers with experts may lose, on the dense path: one group, of experts
one of them, at a time.
"""

from collections.abc import Sequence
from functools import partial

import torch

from rayprune.workers.network.slicing import Cut
from rayprune.workers.numerics.statistics import best_experts
from rayprune.workers.passes.survey import DensePath, curve, plain_curve, tensors_of
from rayprune.workers.passes.sweep import Parts, Routes
from rayprune.workers.steps.deciding import Deciding
from rayprune.workers.steps.step import Cached, Droppable, Receipt, drop_all, step
from rayprune.workers.store.files import Task, write_tensors
from rayprune.workers.store.layout import survey_file
from rayprune.workers.store.shards import Node, roots
from rayprune.workers.workbench import Workbench


class Surveying:
    """Error curves and cuts of the dense model's groups."""

    def __init__(self, bench: Workbench, deciding: Deciding, before: Sequence[Droppable]) -> None:
        self._bench, self._deciding, self._before = bench, deciding, before
        self._path = Cached(self._new_path)
        self._job = bench.job

    def drop(self) -> None:
        """Forget hidden states and inputs of the dense path."""
        self._path.drop()

    def _new_path(self) -> DensePath:
        bench = self._bench
        return DensePath(
            bench.model,
            [layer.members for layer in bench.checkpoint.model.layers],
            partial(bench.statistic, self._job.calibration.samples),
            bench.shards(),
            bench.scope,
            checkpoint_layers=0,
            keep_inputs=False,
            drift=0.0,
            warn=bench.warnings.append,
        )

    @property
    def _trees(self) -> tuple[Node, Node]:
        return roots(self._job.calibration.shards, self._job.calibration.held_out_shards)

    @step
    def look_at(self, layer: int, group: str, owned: tuple[int, int]) -> tuple[Receipt, Parts]:
        """Statistics of a group's consumer input in the dense model over some calibration
        shards.
        """
        drop_all(self._before)
        return {}, self._path.value.collect(layer, group, owned, {}, self._trees)

    @step
    def look_at_experts(self, layer: int, owned: tuple[int, int]) -> tuple[Receipt, Routes]:
        """The same of a layer's whole experts."""
        drop_all(self._before)
        return {}, self._path.value.route(layer, owned, {}, self._trees)

    @step
    def survey_group(
        self,
        layer: int,
        task: Task,
        group: str,
        counts: Sequence[int],
        stored: Sequence[int],
        *parts: Parts,
    ) -> tuple[Receipt, None]:
        """The error curve of a group, and its cuts for the `stored` numbers of units in a file."""
        found = self._bench.groups[group]
        fits = self._deciding.merged(self._trees, parts)
        weight_DF = self._bench.consumer_weight(layer, found)
        dtype = self._bench.disk_dtype(weight_DF)
        if found.expert is not None and not fits[0].num_tokens:
            drawn = plain_curve(weight_DF, found, counts, stored, dtype)
        else:
            options = self._deciding.damped_for(found, fits)
            ranked_by = self._deciding.ranked_by(layer, group)
            how = self._job.method, options
            drawn = curve(how, fits, weight_DF, found, ranked_by, counts, stored, dtype)
        write_tensors(task.folder / survey_file(group), tensors_of(drawn.cuts))
        return {"errors": drawn.errors}, None

    @step
    def survey_experts(
        self, task: Task, counts: Sequence[int], *parts: Routes
    ) -> tuple[Receipt, None]:
        """What is lost with so many experts of a layer, which ones stay then in a file, and how
        much each adds to what the block gives.
        """
        training, held_out = self._deciding.routing(self._trees, parts)
        whole, group = training.merge(held_out), self._bench.groups["experts"]
        scores_E = whole.scores(self._job.budget.expert_score)
        units = {count: best_experts(scores_E, count, group.parts) for count in counts}
        cuts = {count: Cut(group.name, stay, torch.empty(0)) for count, stay in units.items()}
        write_tensors(task.folder / survey_file(group.name), tensors_of(cuts))
        errors = {count: whole.lost(stay.tolist()) ** 2 for count, stay in units.items()}
        return {"errors": errors, "energies": whole.energies_E.tolist()}, None
