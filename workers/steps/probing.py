"""Steps that predict the errors of a shape on a few layers of the dense model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from rayprune.workers.model.description import Group
from rayprune.workers.network import layers
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.numerics.statistics import Statistic
from rayprune.workers.passes.kept import read_fits, write_fits
from rayprune.workers.passes.stream import Fits
from rayprune.workers.passes.sweep import Parts, check_finite, embed_all, grow_statistics
from rayprune.workers.steps.deciding import Deciding
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit
from rayprune.workers.store.layout import STATISTICS_FILE
from rayprune.workers.store.shards import roots
from rayprune.workers.workbench import Workbench


class Probing:
    """Statistics of dense layers, and the errors of decisions made from them."""

    def __init__(self, bench: Workbench, deciding: Deciding) -> None:
        self._bench, self._deciding = bench, deciding
        self._at: dict[tuple[int, int], tuple[int, list[MicroBatch]]] = {}
        self._job = bench.job

    def _groups(self, layer: int) -> dict[str, Group]:
        """What is looked at: every group, and some of the experts."""
        in_layer = self._bench.checkpoint.model.layers[layer].groups
        groups = [group for group in in_layer if group.kind != "experts"]
        some = [member for group in groups for member in group.probed]
        return {member.name: member for member in some}

    def drop(self) -> None:
        """Forget the hidden states."""
        self._at.clear()

    @step
    def probe(
        self, layer: int, owned: tuple[int, int], num_held_out: int
    ) -> tuple[Receipt, dict[str, Parts]]:
        """Statistics of every group of a layer on the dense path, over some of the probe's
        windows.

        Raises:
            ModelError: an activation is not finite.
        """
        count = self._job.budget.probe_samples
        # first call, or an earlier attempt went further
        if self._at.get(owned, (layer + 1, []))[0] > layer:
            self._at[owned] = (
                0,
                embed_all(self._bench.model, self._bench.spread_windows(count, range(*owned))),
            )
        at, batches = self._at[owned]
        inputs: list[dict[str, Tensor]] = []
        for index in range(at, layer + 1):
            module = self._bench.model.load_layer(index)
            looked_at = self._groups(layer) if index == layer else {}
            inputs = [layers.dense_pass(module, index, batch, looked_at) for batch in batches]
        self._at[owned] = (layer + 1, batches)
        trees = roots(self._job.budget.probe_samples, num_held_out)

        def leaf(name: str, window: int) -> Statistic:
            statistic = self._bench.statistic(count, self._bench.groups[name])
            statistic.update(inputs[window - owned[0]][name].flatten(0, -2))
            check_finite(statistic, self._bench.model, layer, self._bench.groups[name])
            return statistic

        # as states: every prediction makes statistics of its own of them
        return {}, {
            name: {
                node: statistic.state()
                for node, statistic in grow_statistics(trees, owned, partial(leaf, name)).items()
            }
            for name in self._groups(layer)
        }

    @step
    def predict(
        self, layer: int, group: str, num_kept: int, num_held_out: int, *parts: dict[str, Parts]
    ) -> tuple[Receipt, None]:
        """Relative held-out output error if so many units of a group stayed, from the probe's
        statistics.
        """
        return self._predicted(layer, group, num_kept, self._merged(group, num_held_out, parts))

    @step
    def keep_probed(
        self, layer: int, task: Task, num_held_out: int, *parts: dict[str, Parts]
    ) -> tuple[Receipt, None]:
        """Write the probe's statistics of a layer, for predictions of other runs too."""
        fits = {name: self._merged(name, num_held_out, parts) for name in self._groups(layer)}
        write_fits(task.folder, fits)
        commit(task, [STATISTICS_FILE], {"computed_on": self._bench.model.computed_on})
        return {}, None

    @step
    def predict_from_kept(
        self, layer: int, group: str, num_kept: int, folder: str
    ) -> tuple[Receipt, None]:
        """As `predict`, from what `keep_probed` has written."""
        fits = read_fits(Path(folder), group, self._bench.scratch)
        return self._predicted(layer, group, num_kept, fits)

    def _merged(self, group: str, num_held_out: int, parts: Sequence[dict[str, Parts]]) -> Fits:
        trees = roots(self._job.budget.probe_samples, num_held_out)
        return self._deciding.merged(trees, [part[group] for part in parts])

    def _predicted(self, layer: int, group: str, num_kept: int, fits: Fits) -> tuple[Receipt, None]:
        _, correction = self._deciding.cut(layer, group, num_kept, fits)
        return {"held_out_error": correction.held_out_error}, None
