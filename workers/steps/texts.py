"""Steps that turn texts into tokens."""

from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit, write_tensors
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    GATE_TOKENS_TASK,
    MASKED,
    RECOVERY_TOKENS_TASK,
    TOKENS,
    TOKENS_FILE,
)
from rayprune.workers.tokens import JobTexts
from rayprune.workers.workbench import Workbench


class Texts:
    """Tokens of the job's texts."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @step
    def tokenize(self, task: Task) -> tuple[Receipt, None]:
        """Tokenise the calibration or (afterwards) the evaluation text, or what a gate is measured
        or a recovery trained on, once; every worker reads the resulting file.
        """
        self._bench.prepare()
        texts = self._texts()
        if task.name == CALIBRATION_TASK:
            tokens = texts.calibration()
        elif task.name == GATE_TOKENS_TASK:
            tokens = texts.gate()
        elif task.name == RECOVERY_TOKENS_TASK:
            tokens = texts.recovery()
        else:
            tokens = texts.evaluation(self._bench.tokens(CALIBRATION_TASK))
        found = {
            "texts": [text.facts.document() for text in tokens.texts],
            "warnings": tokens.warnings,
        }
        masked = {} if tokens.masked_ST is None else {MASKED: tokens.masked_ST}
        write_tensors(task.folder / TOKENS_FILE, {TOKENS: tokens.windows_ST, **masked})
        windows = [len(text.windows_NT) for text in tokens.texts]
        told = {"shape": list(tokens.windows_ST.shape), "windows": windows}
        commit(task, [TOKENS_FILE], told | found | {"opening": tokens.opening})
        return found, None

    @step
    def check_text(self) -> tuple[Receipt, None]:
        """Check that the calibration text has as many windows as the job reads."""
        self._texts().all_read(self._bench.tokens(CALIBRATION_TASK))
        return {}, None

    def _texts(self) -> JobTexts:
        return JobTexts(self._bench.job, self._bench.checkpoint)
