"""The step in which the whole model is trained, by all workers at once."""

import gc

import torch

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
            ResourceError: there is not enough memory.
            LostPeerError: another rank is gone.
        """
        ranks = Ranks(rank, count, self._bench.device)
        self._give_back()
        with default_group(address, rank, count, ranks.device):
            train_rank(as_planned(stage, self._bench.memory), ranks)
        self._give_back()
        return {}, None

    def _give_back(self) -> None:
        """Free what is left of other work: a model that was sharded holds itself, and NCCL finds no
        room in what torch keeps of a GPU.
        """
        gc.collect()
        if self._bench.device.type == "cuda":
            torch.cuda.empty_cache()
