"""The stage that turns texts into tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import file_digests
from rayprune.workers.store.files import Manifest, record_of
from rayprune.workers.store.layout import CALIBRATION_TASK, EVALUATION_TASK
from rayprune.workers.store.side_files import TOKENIZER_FILES, side_files


def tokenize(context: Context, model: Path) -> tuple[Manifest, Manifest | None]:
    """The calibration and the evaluation text as tokens, so that a text that will not do is found
    before any other work.
    """
    evaluation, texts = context.job.evaluation, text_digests(context)
    with context.stage("tokenize", 1 + (evaluation is not None)):
        calibration = _tokens(context, model, CALIBRATION_TASK, {"texts": texts})
        if evaluation is None:
            return calibration, None
        inputs = {
            "text": _digests([evaluation.path]),
            "calibration-tokens": calibration.digest,
            "texts": texts,
        }
        return calibration, _tokens(context, model, EVALUATION_TASK, inputs)


def text_digests(context: Context) -> list[str]:
    """SHA-256 of every calibration text."""
    calibration = context.job.calibration
    return _digests([calibration.path, *(text.path for text in calibration.mix)])


def _digests(texts: Sequence[str]) -> list[str]:
    # the worker reports a missing text
    return [record_of(Path(text)).sha256 if Path(text).is_file() else "" for text in texts]


def _tokens(context: Context, model: Path, name: str, inputs: Mapping[str, object]) -> Manifest:
    """Tokenise texts, once; depends on the texts, the tokenizer, the cutting and `inputs`, not on
    the rest of the job.
    """
    tokenizer = file_digests(side_files(model, TOKENIZER_FILES))
    task, executor = context.task(name, {"tokenizer": tokenizer, **inputs}), context.executor
    return context.once(task, lambda: executor.wait([executor.on(0).tokenize(task)]))
