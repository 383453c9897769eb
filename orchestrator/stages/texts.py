"""The stage that turns texts into tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import file_digests
from rayprune.specs.errors import SpecError
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Manifest, record_of
from rayprune.workers.store.layout import CALIBRATION_TASK, EVALUATION_TASK, GATE_TOKENS_TASK
from rayprune.workers.store.side_files import CHAT_TEMPLATES, TOKENIZER_FILES, side_files
from rayprune.workers.texts.files import text_files


def tokenize(
    context: Context, model: Checkpoint, texts: Sequence[str]
) -> tuple[Manifest, Manifest | None, list[str]]:
    """The calibration texts, of which the digests are given, and the evaluation text as tokens, so
    that a text that will not do is found before any other work; and warnings about them.
    """
    evaluation, paths = context.job.evaluation, _paths(context)
    with context.stage("tokenize", 1 + (evaluation is not None)):
        calibration = _tokens(context, model, CALIBRATION_TASK, paths, {"texts": texts})
        if evaluation is None:
            return calibration, None, _warnings(calibration)
        held_out = [text.path for text in evaluation.by_name.values()]
        digests = [digest_of(Path(path)) for path in held_out]
        inputs = {
            "text": digests[0] if evaluation.texts is None else digests,
            "calibration-tokens": calibration.digest,
            "texts": texts,
        }
        evaluated = _tokens(context, model, EVALUATION_TASK, held_out, inputs)
        return calibration, evaluated, [*_warnings(calibration), *_warnings(evaluated)]


def tokenize_gate(
    context: Context, model: Checkpoint, texts: Sequence[str]
) -> tuple[Manifest, list[str]]:
    """The windows of the calibration texts that steps are measured on, and warnings about them."""
    with context.stage("tokenize", 1):
        tokens = _tokens(context, model, GATE_TOKENS_TASK, _paths(context), {"texts": texts})
    return tokens, _warnings(tokens)


def _warnings(tokens: Manifest) -> list[str]:
    found: Any = tokens.info["warnings"]
    return list(found)


def text_digests(context: Context) -> list[str]:
    """What every calibration text holds."""
    return [digest_of(Path(path)) for path in _paths(context)]


def _paths(context: Context) -> list[str]:
    return [text.path for text in context.job.calibration.texts]


def _tokens(
    context: Context,
    model: Checkpoint,
    name: str,
    texts: Sequence[str],
    inputs: Mapping[str, object],
) -> Manifest:
    """Tokenise texts, once; depends on the texts, the tokenizer, the cutting and `inputs`, not on
    the rest of the job.
    """
    tokenizer = file_digests(side_files(model.path, (*TOKENIZER_FILES, *CHAT_TEMPLATES)))
    read = {"tokenizer": tokenizer, **inputs}
    if not model.model.causal:
        read["windows of an encoder"] = {"masked": model.model.predicts_masked}
    task, executor = context.task(name, read), context.executor
    done = context.once(task, lambda: executor.wait([executor.on(0).tokenize(task)]))
    found: Any = done.info
    for path, facts in zip(texts, found["texts"], strict=True):
        context.emit("text", path=path, **facts)
    return done


def digest_of(text: Path) -> str:
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
