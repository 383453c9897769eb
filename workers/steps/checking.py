"""Steps that check what a run stands on and what it has written."""

import torch

from rayprune.specs.errors import ModelError
from rayprune.workers.network.layers import read_tensors
from rayprune.workers.network.load_check import check_loads
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import FileRecord
from rayprune.workers.store.layout import model_folder
from rayprune.workers.store.storage import check_same_files
from rayprune.workers.workbench import Workbench

HEADS = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices that are one where embeddings are tied."""


class Checking:
    """Checks of files and models."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @step
    def check_storage(self, expected: dict[str, FileRecord]) -> tuple[Receipt, None]:
        """Check that this node sees the driver's files."""
        check_same_files(expected)
        return {}, None

    @step
    def check_head(self) -> tuple[Receipt, None]:
        """Check that a head that is called tied is the embedding matrix, if it is in the files at
        all.

        Raises:
            ModelError: it is another one.
        """
        infos = {
            name: self._bench.checkpoint.tensors[name]
            for name in HEADS
            if name in self._bench.checkpoint.tensors
        }
        if self._bench.checkpoint.tied_embeddings and len(infos) == len(HEADS):
            embedding_VD, head_VD = (
                read_tensors(self._bench.checkpoint, infos)[name] for name in HEADS
            )
            if embedding_VD.shape != head_VD.shape or not all(
                map(torch.equal, embedding_VD.split(1024), head_VD.split(1024))
            ):
                raise ModelError(
                    f"{self._bench.checkpoint.path}: {HEADS[1]} differs from {HEADS[0]}, but"
                    " config.json says that they are one: set tie_word_embeddings: false there"
                )
        return {}, None

    @step
    def check_export(self, expected_parameters: int) -> tuple[Receipt, None]:
        """The load gate on the exported folder."""
        check_loads(model_folder(self._bench.run_folder), expected_parameters)
        return {}, None
