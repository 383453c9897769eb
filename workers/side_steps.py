"""The steps of a worker beside the pruning: texts, gradients of the dense model, perplexity,
checks.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rayprune.specs.errors import ModelError, VerificationError
from rayprune.workers.calibration import (
    calibration_windows,
    check_apart,
    evaluation_windows,
    load_tokenizer,
)
from rayprune.workers.model.families import layer_prefix
from rayprune.workers.network.layers import computed_on, digest_of, read_tensors
from rayprune.workers.network.load_check import check_loads
from rayprune.workers.passes.evaluate import window_losses
from rayprune.workers.passes.gradients import added, squared_gradients
from rayprune.workers.passes.sweep import check_computed_on
from rayprune.workers.store.files import FileRecord, Task, commit, read_manifest, write_tensors
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    GRADIENTS_FILE,
    GRADIENTS_TASK,
    TOKENS_FILE,
)
from rayprune.workers.store.shards import Node, grow_tree, merge_siblings, owned_nodes
from rayprune.workers.store.storage import check_same_files
from rayprune.workers.workbench import Receipt, Workbench, step

HEADS = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices that are one where embeddings are tied."""
SquaresArrays = dict[Node, dict[str, np.ndarray]]
"""Summed squared gradients by node of the tree over their windows, as they go from worker to
worker.
"""


class SideSteps(Workbench):
    """What a worker does before and after pruning."""

    @step
    def check_storage(self, expected: dict[str, FileRecord]) -> tuple[Receipt, None]:
        """Check that this node sees the driver's files."""
        check_same_files(expected)
        return {}, None

    @step
    def tokenize(self, task: Task) -> tuple[Receipt, None]:
        """Tokenise the calibration or (afterwards) the evaluation text once; every worker reads the
        resulting file.
        """
        tokenizer, evaluation = load_tokenizer(Path(self.job.model.path)), self.job.evaluation
        if task.name == CALIBRATION_TASK:
            tokens = calibration_windows(self.job.calibration, tokenizer)
            self._text_read(tokens)  # whether the text suffices is known now
        else:
            assert evaluation is not None
            tokens = evaluation_windows(evaluation, tokenizer)
            check_apart(self._text_read(self._tokens(CALIBRATION_TASK)), tokens, evaluation.path)
        write_tensors(task.folder / TOKENS_FILE, {"tokens": tokens})
        commit(task, [TOKENS_FILE], {"shape": list(tokens.shape)})
        return {}, None

    @step
    def how_computed(self) -> tuple[Receipt, None]:
        """Device kind and type of forward passes on this worker."""
        return {"computed_on": computed_on(self.device, self._dtype)}, None

    @step
    def digests(self, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """SHA-256 of some parts of the model: of what is outside its layers (0), and of layer n - 1
        (n).
        """
        checkpoint = self._checkpoint
        return {
            "digests": [
                digest_of(checkpoint, checkpoint.layer_tensors(part - 1), layer_prefix(part - 1))
                if part
                else digest_of(checkpoint, checkpoint.outer_tensors)
                for part in range(*owned)
            ]
        }, None

    @step
    def check_text(self) -> tuple[Receipt, None]:
        """Check that the calibration text has as many windows as the job reads."""
        self._text_read(self._tokens(CALIBRATION_TASK))
        return {}, None

    def _text_read(self, given_ST: Tensor) -> Tensor:
        """All windows that the job reads of its text: those of the calibration, `given`, unless a
        training takes more (S, T).
        """
        if self.job.windows_read == len(given_ST):
            return given_ST
        read = self.job.calibration.model_copy(update={"samples": self.job.windows_read})
        return calibration_windows(read, load_tokenizer(Path(self.job.model.path)))

    @step
    def gradients(self, owned: tuple[int, int]) -> tuple[Receipt, SquaresArrays]:
        """Squared gradients of the dense model's loss at every consumer's input, over some of the
        windows they are measured on.
        """
        count = self.job.gradient_windows
        windows = self._spread_windows(count, range(*owned))
        found = squared_gradients(self._model, self._groups, windows, owned[0], self._spill(True))
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
        root = (0, self.job.gradient_windows)
        sums = {
            node: {name: torch.from_numpy(array) for name, array in arrays.items()}
            for part in parts
            for node, arrays in part.items()
        }
        tokens = self.job.gradient_windows * self.job.calibration.sequence_length
        scales = {
            name: (squares / tokens).sqrt()
            for name, squares in merge_siblings(root, sums, added)[root].items()
        }
        if wrong := [name for name, scale in scales.items() if not scale.isfinite().all()]:
            raise ModelError(
                f"{wrong[0]}: gradients of the loss are not finite; set model.dtype: float32"
            )
        write_tensors(task.folder / GRADIENTS_FILE, scales)
        commit(task, [GRADIENTS_FILE], {"computed_on": self._model.computed_on})
        return {}, None

    def _ranked_by(self, layer: int, name: str) -> Tensor:
        """What gives a group's columns their scale: the consumer's weight (D, F), or the gradients
        at its input as one row (1, F).
        """
        if not self.job.gradient_windows:
            return self._consumer_weight(layer, self._groups[name])
        folder = self.scope.folder(GRADIENTS_TASK)
        manifest = read_manifest(folder)
        assert manifest is not None, "gradients are not measured"
        check_computed_on(folder, manifest, self._model.computed_on)
        with safe_open(folder / GRADIENTS_FILE, framework="pt") as handle:
            row_1F: Tensor = handle.get_slice(name)[layer : layer + 1]
        return row_1F.to(self.device)

    @step
    def evaluate(self, model_path: str, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """Negative log-likelihoods (nats) of some evaluation windows under the model of a
        folder.
        """
        assert self.job.evaluation is not None
        for name in ("_sweep", "_stream"):
            # their hidden states and statistics are not needed any more
            self.__dict__.pop(name, None)
        stride = self.job.evaluation.effective_stride
        windows_NT = self._tokens(EVALUATION_TASK)[slice(*owned)]
        if len(windows_NT) == 0:
            return {"losses": []}, None
        store = self._spill(self._memory.spill_hidden).store
        return {
            "losses": window_losses(
                Path(model_path), windows_NT, owned[0], stride, self._dtype, self.device, store
            )
        }, None

    @step
    def write_tokenizer(self) -> tuple[Receipt, None]:
        """Write the tokenizer anew where the model type is another: transformers would take another
        class for the files as they are.

        Raises:
            VerificationError: it gives other tokens.
        """
        folder, tokenizer = self.scope.model, load_tokenizer(self._checkpoint.path)
        tokenizer.save_pretrained(folder)
        sample = "a  b\n" + "a b ".join(["", *tokenizer.all_special_tokens, ""])
        if load_tokenizer(folder)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
            raise VerificationError(
                f"{folder}: its tokenizer gives other tokens than that of {self._checkpoint.path}"
            )
        return {}, None

    @step
    def check_head(self) -> tuple[Receipt, None]:
        """Check that a head that is called tied is the embedding matrix, if it is in the files at
        all.

        Raises:
            ModelError: it is another one.
        """
        infos = {
            name: self._checkpoint.tensors[name]
            for name in HEADS
            if name in self._checkpoint.tensors
        }
        if self._checkpoint.tied_embeddings and len(infos) == len(HEADS):
            embedding_VD, head_VD = (read_tensors(self._checkpoint, infos)[name] for name in HEADS)
            if embedding_VD.shape != head_VD.shape or not all(
                map(torch.equal, embedding_VD.split(1024), head_VD.split(1024))
            ):
                raise ModelError(
                    f"{self._checkpoint.path}: {HEADS[1]} differs from {HEADS[0]}, but config.json"
                    " says that they are one: set tie_word_embeddings: false there"
                )
        return {}, None

    @step
    def check_export(self, expected_parameters: int) -> tuple[Receipt, None]:
        """The load gate on the exported folder."""
        check_loads(self.scope.model, expected_parameters)
        return {}, None
