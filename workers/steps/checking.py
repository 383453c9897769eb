"""Steps that check what a run stands on and what it has written."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.folder import TensorInfo
from rayprune.workers.network.load_check import check_loads
from rayprune.workers.network.reading import digest_of, read_tensors
from rayprune.workers.network.written import narrowed
from rayprune.workers.network.zeros import check_folder_zeros
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import FileRecord, at_once
from rayprune.workers.store.storage import check_same_files
from rayprune.workers.workbench import Workbench


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
    def how_computed(self) -> tuple[Receipt, None]:
        """Device kind and type of forward passes on this worker."""
        return {"computed_on": self._bench.computed_on}, None

    @step
    def digests(self, model: str, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """SHA-256 of some parts of a model folder: of what is outside its layers (0), and of layer
        n - 1 (n).

        Raises:
            ModelError: a weight is too large for the exported type.
        """
        checkpoint = open_checkpoint(Path(model))
        parts = [
            checkpoint.layer_tensors(n - 1) if n else checkpoint.outer_tensors
            for n in range(*owned)
        ]
        if self._bench.job.export.dtype == "float16":  # bfloat16 reaches as far as float32
            for n, infos in zip(range(*owned), parts, strict=True):
                prefix = checkpoint.model.prefix(n - 1) if n else ""
                self._check_range(checkpoint, infos, prefix)
        return {"digests": at_once(partial(digest_of, checkpoint), parts)}, None

    def _check_range(
        self, checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], prefix: str
    ) -> None:
        """Miss a weight that is too large for the exported type now, not after the sweep."""
        for name, tensor in read_tensors(checkpoint, infos, prefix).items():
            narrowed(tensor, self._bench.disk_dtype(tensor), prefix + name)

    @step
    def check_head(self) -> tuple[Receipt, None]:
        """Check that a head that is called tied is the embedding matrix, if it is in the files at
        all.

        Raises:
            ModelError: it is another one.
        """
        checkpoint, model = self._bench.checkpoint, self._bench.checkpoint.model
        heads = (model.embedding, model.head)
        infos = {n: checkpoint.tensors[n] for n in heads if n in checkpoint.tensors}
        if model.tied and len(infos) == len(heads):
            found = read_tensors(checkpoint, infos)
            embedding_VD, head_VD = (found[name] for name in heads)
            if embedding_VD.shape != head_VD.shape or not all(
                map(torch.equal, embedding_VD.split(1024), head_VD.split(1024))
            ):
                raise ModelError(
                    f"{checkpoint.path}: {model.head} differs from {model.embedding}, but"
                    " config.json says that they are one: set tie_word_embeddings: false there"
                )
        return {}, None

    @step
    def check_export(self, expected_parameters: int) -> tuple[Receipt, None]:
        """The load gate on the exported folder, and a look at its zeros, if it should have some."""
        check_loads(self._bench.scope.model, expected_parameters)
        if self._bench.job.method.masks:
            check_folder_zeros(self._bench.scope.model)
        return {}, None
