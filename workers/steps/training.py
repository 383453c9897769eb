"""The step in which the whole model is trained, by all workers at once."""

import gc

from rayprune.workers.machine.peers import default_group
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.training_stage import Finetune, as_planned
from rayprune.workers.training.loop import Ranks
from rayprune.workers.training.rank import train_rank
from rayprune.workers.workbench import Workbench


class Finetuning:
    """A rank of a gang."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @step
    def train(
        self, stage: Finetune, address: tuple[str, int] | None, rank: int, count: int
    ) -> tuple[Receipt, None]:
        """Train as one of `count` ranks, which meet at `address`; alone without one.

        Raises:
            ModelError: the loss, its gradient or a weight is not finite, or the model cannot be
                read.
            LostPeerError: another rank is gone.
        """
        ranks = Ranks(rank, count, self._bench.device)
        with default_group(address, rank, count, ranks.device):
            train_rank(as_planned(stage, self._bench.memory), ranks)
        gc.collect()  # a model that was sharded holds itself
        return {}, None
