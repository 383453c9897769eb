"""The steps of a worker beside the pruning: texts, gradients of the dense model, perplexity,
checks.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rayprune.specs.errors import ModelError, VerificationError
from rayprune.workers.calibration import ReadText, load_tokenizer, read_calibration, read_evaluation
from rayprune.workers.network.layers import read_tensors
from rayprune.workers.network.load_check import check_loads
from rayprune.workers.passes.evaluate import window_losses
from rayprune.workers.passes.gradients import added, squared_gradients
from rayprune.workers.passes.sweep import check_computed_on
from rayprune.workers.store.files import FileRecord, commit, read_manifest, write_tensors
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    GRADIENTS_FILE,
    GRADIENTS_TASK,
    TOKENS_FILE,
    model_folder,
    task_folder,
)
from rayprune.workers.store.shards import Node, grow_tree, merge_siblings, owned_nodes
from rayprune.workers.store.storage import check_same_files
from rayprune.workers.texts.checks import (
    check_apart,
    check_known,
    check_positions,
    check_varied,
    embedding_rows,
)
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
    def tokenize(self, task: str, task_fingerprint: str) -> tuple[Receipt, None]:
        """Tokenise the calibration or (afterwards) the evaluation text once; every worker reads the
        resulting file.
        """
        tokenizer, evaluation = load_tokenizer(Path(self.job.model.path)), self.job.evaluation
        if task == CALIBRATION_TASK:
            tokens, texts = read_calibration(self.job.calibration, tokenizer)
            option, apart = "calibration.sequence_length", []
            self._check_read(self._all_read()[1] if self._reads_more else texts)
        else:
            assert evaluation is not None
            texts = [read_evaluation(evaluation, tokenizer)]
            tokens, option = texts[0].windows_NT, "evaluation.window"
            self._check_read(texts)
            calibration_ST = self._text_read(self._tokens(CALIBRATION_TASK))
            apart = check_apart(calibration_ST, tokens, evaluation.path)
        found = {
            "texts": [text.facts.document() for text in texts],
            "warnings": check_positions(self._checkpoint, tokens.shape[1], option)
            + [warning for text in texts for warning in check_varied(text.windows_NT, text.path)]
            + apart,
        }
        folder = task_folder(self.run_folder, task)
        write_tensors(folder / TOKENS_FILE, {"tokens": tokens})
        commit(
            folder, task, task_fingerprint, [TOKENS_FILE], {"shape": list(tokens.shape), **found}
        )
        return found, None

    def _check_read(self, texts: list[ReadText]) -> None:
        """Check that the model has an embedding for every token."""
        rows = embedding_rows(self._checkpoint)
        for text in texts:
            check_known(text.windows_NT, rows, text.path, text.facts)

    @step
    def check_text(self) -> tuple[Receipt, None]:
        """Check that the calibration text has as many windows as the job reads."""
        self._text_read(self._tokens(CALIBRATION_TASK))
        return {}, None

    def _text_read(self, given_ST: Tensor) -> Tensor:
        """All windows that the job reads of its text: those of the calibration, `given`, unless a
        training takes more (S, T).
        """
        return self._all_read()[0] if self._reads_more else given_ST

    @property
    def _reads_more(self) -> bool:
        """Whether a training takes more windows than the calibration."""
        return self.job.windows_read > self.job.calibration.samples

    def _all_read(self) -> tuple[Tensor, list[ReadText]]:
        """All windows that the job reads of its text (S, T), and those of each text."""
        read = self.job.calibration.model_copy(update={"samples": self.job.windows_read})
        return read_calibration(read, load_tokenizer(Path(self.job.model.path)))

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
    def write_gradients(self, task_fingerprint: str, *parts: SquaresArrays) -> tuple[Receipt, None]:
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
        folder = task_folder(self.run_folder, GRADIENTS_TASK)
        write_tensors(folder / GRADIENTS_FILE, scales)
        commit(
            folder,
            GRADIENTS_TASK,
            task_fingerprint,
            [GRADIENTS_FILE],
            {"computed_on": self._model.computed_on},
        )
        return {}, None

    def _ranked_by(self, layer: int, name: str) -> Tensor:
        """What gives a group's columns their scale: the consumer's weight (D, F), or the gradients
        at its input as one row (1, F).
        """
        if not self.job.gradient_windows:
            return self._consumer_weight(layer, self._groups[name])
        folder = task_folder(self.run_folder, GRADIENTS_TASK)
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
        folder, tokenizer = model_folder(self.run_folder), load_tokenizer(self._checkpoint.path)
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
        check_loads(model_folder(self.run_folder), expected_parameters)
        return {}, None
