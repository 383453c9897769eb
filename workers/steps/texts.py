"""Steps that turn texts into tokens."""

from pathlib import Path

from torch import Tensor

from rayprune.workers.calibration import ReadText, load_tokenizer, read_calibration, read_evaluation
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit, write_tensors
from rayprune.workers.store.layout import CALIBRATION_TASK, TOKENS_FILE
from rayprune.workers.texts.checks import check_apart, check_known, check_varied
from rayprune.workers.texts.limits import check_positions, embedding_rows
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
            tokens, texts = read_calibration(self._job.calibration, tokenizer)
            option, apart = "calibration.sequence_length", []
            self._check_read(self._all_read()[1] if self._reads_more else texts)
        else:
            assert evaluation is not None
            texts = [read_evaluation(evaluation, tokenizer)]
            tokens, option = texts[0].windows_NT, "evaluation.window"
            self._check_read(texts)
            calibration_ST = self._text_read(self._bench.tokens(CALIBRATION_TASK))
            apart = check_apart(calibration_ST, tokens, evaluation.path)
        found = {
            "texts": [text.facts.document() for text in texts],
            "warnings": check_positions(self._bench.checkpoint, tokens.shape[1], option)
            + [warning for text in texts for warning in check_varied(text.windows_NT, text.path)]
            + apart,
        }
        write_tensors(task.folder / TOKENS_FILE, {"tokens": tokens})
        commit(task, [TOKENS_FILE], {"shape": list(tokens.shape), **found})
        return found, None

    def _check_read(self, texts: list[ReadText]) -> None:
        """Check that the model has an embedding for every token."""
        rows = embedding_rows(self._bench.checkpoint)
        for text in texts:
            check_known(text.windows_NT, rows, text.path, text.facts)

    @step
    def check_text(self) -> tuple[Receipt, None]:
        """Check that the calibration text has as many windows as the job reads."""
        self._text_read(self._bench.tokens(CALIBRATION_TASK))
        return {}, None

    def _text_read(self, given_ST: Tensor) -> Tensor:
        """All windows that the job reads of its text: those of the calibration, `given`, unless a
        training takes more (S, T).
        """
        return self._all_read()[0] if self._reads_more else given_ST

    @property
    def _reads_more(self) -> bool:
        """Whether a training takes more windows than the calibration."""
        return self._job.windows_read > self._job.calibration.samples

    def _all_read(self) -> tuple[Tensor, list[ReadText]]:
        """All windows that the job reads of its text (S, T), and those of each text."""
        read = self._job.calibration.model_copy(update={"samples": self._job.windows_read})
        return read_calibration(read, load_tokenizer(Path(self._job.model.path)))
