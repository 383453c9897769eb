"""The stage that turns texts into tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.specs.errors import SpecError
from rayprune.specs.job import TextSpec
from rayprune.workers.store.files import Manifest, record_of
from rayprune.workers.store.layout import CALIBRATION_TASK, EVALUATION_TASK
from rayprune.workers.store.side_files import CHAT_TEMPLATES, TOKENIZER_FILES, side_files
from rayprune.workers.texts.files import text_files


def tokenize(context: Context) -> tuple[Manifest, Manifest | None]:
    """The calibration and the evaluation text as tokens, so that a text that will not do is found
    before any other work.
    """
    job, spec = context.job.calibration, context.job.evaluation
    cutting = job.model_dump(mode="json", include={"samples", "sequence_length"}) | {
        "texts": [_reading(text) for text in (job, *job.mix)]
    }
    with context.stage("tokenize", 1 + (spec is not None)):
        calibration = _tokens(
            context, CALIBRATION_TASK, cutting, [job.path, *(text.path for text in job.mix)]
        )
        if spec is None:
            return calibration, None
        part = spec.model_dump(mode="json") | {"apart_from": context.job.windows_read}
        return calibration, _tokens(
            context, EVALUATION_TASK, part, [spec.path], calibration.digest, redo_stale=True
        )


def _reading(text: TextSpec) -> dict[str, Any]:
    """How a text is read, and its weight if it has one; where it lies does not matter."""
    return text.model_dump(mode="json", include={"format", "field", "weight"})


def _tokens(
    context: Context,
    task: str,
    part: dict[str, Any],
    texts: Sequence[str],
    *inputs: str,
    redo_stale: bool = False,
) -> Manifest:
    """Tokenise texts, once; depends on the texts, the tokenizer, the cutting and `inputs`, not on
    the rest of the job.
    """
    tokenizer = [
        record_of(file).sha256
        for file in side_files(context.checkpoint.path, (*TOKENIZER_FILES, *CHAT_TEMPLATES))
    ]
    digests = [_digest(Path(text)) for text in texts]
    expected = context.folder.fingerprint(task, *tokenizer, *digests, *inputs, part=part)
    submit = context.executor.submit
    done = context.once(
        task,
        expected,
        lambda: context.executor.wait([submit(0, "tokenize", task, expected)]),
        redo_stale,
    )
    found: Any = done.info
    for text, facts in zip(texts, found["texts"], strict=True):
        context.emit("text", path=text, **facts)
    for warning in found["warnings"]:
        context.emit("warning", text=warning)
    return done


def _digest(text: Path) -> str:
    """What a text holds: the digest of a file, or names and digests of a folder's files; nothing
    where it cannot be read, which the worker reports.
    """
    try:
        files = text_files(text)
        if files == [text]:
            return record_of(text).sha256
        return "\n".join(f"{file.name} {record_of(file).sha256}" for file in files)
    except (SpecError, OSError):
        return ""
