"""Steps that turn texts into tokens."""

from pathlib import Path

from torch import Tensor

from rayprune.workers.calibration import (
    calibration_windows,
    check_apart,
    evaluation_windows,
    load_tokenizer,
)
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit, write_tensors
from rayprune.workers.store.layout import CALIBRATION_TASK, TOKENS_FILE
from rayprune.workers.workbench import Workbench


class Texts:
    """Tokens of the job's texts."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._job = bench.job

    @step
    def tokenize(self, task: Task) -> tuple[Receipt, None]:
        """Tokenise the calibration or (afterwards) the evaluation text once; every worker reads the
        resulting file.
        """
        tokenizer, evaluation = load_tokenizer(Path(self._job.model.path)), self._job.evaluation
        if task.name == CALIBRATION_TASK:
            tokens = calibration_windows(self._job.calibration, tokenizer)
            self._text_read(tokens)  # whether the text suffices is known now
        else:
            assert evaluation is not None
            tokens = evaluation_windows(evaluation, tokenizer)
            check_apart(
                self._text_read(self._bench.tokens(CALIBRATION_TASK)), tokens, evaluation.path
            )
        write_tensors(task.folder / TOKENS_FILE, {"tokens": tokens})
        commit(task, [TOKENS_FILE], {"shape": list(tokens.shape)})
        return {}, None

    @step
    def check_text(self) -> tuple[Receipt, None]:
        """Check that the calibration text has as many windows as the job reads."""
        self._text_read(self._bench.tokens(CALIBRATION_TASK))
        return {}, None

    def _text_read(self, given_ST: Tensor) -> Tensor:
        """All windows that the job reads of its text: those of the calibration, `given`, unless a
        training takes more (S, T).
        """
        if self._job.windows_read == len(given_ST):
            return given_ST
        read = self._job.calibration.model_copy(update={"samples": self._job.windows_read})
        return calibration_windows(read, load_tokenizer(Path(self._job.model.path)))
