"""Steps that measure gradients of the dense model's loss."""

import numpy as np
import torch

from rayprune.specs.errors import ModelError
from rayprune.workers.passes.gradients import added, squared_gradients
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit, write_tensors
from rayprune.workers.store.layout import GRADIENTS_FILE
from rayprune.workers.store.shards import Node, grow_tree, merge_siblings, owned_nodes
from rayprune.workers.workbench import Workbench

SquaresArrays = dict[Node, dict[str, np.ndarray]]
"""Summed squared gradients by node of the tree over their windows, as they go from worker to
worker.
"""


class Measuring:
    """Gradients of the dense model."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._job = bench.job

    @step
    def gradients(self, owned: tuple[int, int]) -> tuple[Receipt, SquaresArrays]:
        """Squared gradients of the dense model's loss at every consumer's input, over some of the
        windows they are measured on.
        """
        count = self._job.gradient_windows
        windows = self._bench.spread_windows(count, range(*owned))
        found = squared_gradients(
            self._bench.model, self._bench.groups, windows, owned[0], self._bench.spill(True)
        )
        nodes = owned_nodes((0, count), range(*owned))
        sums = {
            node: grow_tree(node, lambda window: found[window - owned[0]], added) for node in nodes
        }
        return {}, {
            node: {name: squares.numpy() for name, squares in sum_.items()}
            for node, sum_ in sums.items()
        }

    @step
    def write_gradients(self, task: Task, *parts: SquaresArrays) -> tuple[Receipt, None]:
        """Merge the sums of all workers and write the root mean squares: by group one row for each
        layer, fp64.

        Raises:
            ModelError: one is not finite.
        """
        root = (0, self._job.gradient_windows)
        sums = {
            node: {name: torch.from_numpy(array) for name, array in arrays.items()}
            for part in parts
            for node, arrays in part.items()
        }
        tokens = self._job.gradient_windows * self._job.calibration.sequence_length
        scales = {
            name: (squares / tokens).sqrt()
            for name, squares in merge_siblings(root, sums, added)[root].items()
        }
        if wrong := [name for name, scale in scales.items() if not scale.isfinite().all()]:
            raise ModelError(
                f"{wrong[0]}: gradients of the loss are not finite; {self._bench.model.not_finite}"
            )
        write_tensors(task.folder / GRADIENTS_FILE, scales)
        commit(task, [GRADIENTS_FILE], {"computed_on": self._bench.model.computed_on})
        return {}, None
