"""The stage that turns texts into tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import file_digests
from rayprune.specs.errors import SpecError
from rayprune.specs.texts import WindowsSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Manifest, record_of
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    GATE_TOKENS_TASK,
    RECOVERY_TOKENS_TASK,
    Scope,
)
from rayprune.workers.store.side_files import CHAT_TEMPLATES, TOKENIZER_FILES, side_files
from rayprune.workers.texts.files import text_files
from rayprune.workers.texts.forms import promised


@dataclass(frozen=True)
class Tokenised:
    """The texts of a job as tokens."""

    calibration: Manifest
    recovery: Manifest | None
    """What a recovery is trained on."""
    evaluation: Manifest | None

    @property
    def warnings(self) -> list[str]:
        """About the texts."""
        there = filter(None, (self.calibration, self.recovery, self.evaluation))
        return [warning for tokens in there for warning in _warnings(tokens)]


def tokenize(
    context: Context, model: Checkpoint, texts: Sequence[str], original: Checkpoint
) -> Tokenised:
    """The calibration texts, of which the digests are given, those of a recovery and the evaluation
    text as tokens, so that a text that will not do is found before any other work.

    All passes over a model are recovered on the same tokens, those of the `original`.
    """
    job = context.job
    with context.stage("tokenize", 1 + bool(job.recover) + bool(job.evaluation)):
        calibration = _tokens(context, model, CALIBRATION_TASK, _paths(job.calibration), texts)
        recovery = _recovery_tokens(context, original) if job.recover else None
        if job.evaluation is None:
            return Tokenised(calibration, recovery, None)
        held_out = [text.path for text in job.evaluation.by_name.values()]
        digests = [digest_of(Path(path)) for path in held_out]
        inputs = {
            "text": digests[0] if job.evaluation.texts is None else digests,
            "calibration-tokens": calibration.digest,
        }
        if recovery and job.recover and job.recover.text:
            inputs["recovery-tokens"] = recovery.digest
        evaluated = _tokens(context, model, EVALUATION_TASK, held_out, texts, inputs)
        return Tokenised(calibration, recovery, evaluated)


def _recovery_tokens(context: Context, original: Checkpoint) -> Manifest:
    whole = replace(context, scope=Scope(context.scope.run))
    paths = _paths(context.job.recovery_text)
    digests = [digest_of(Path(path)) for path in paths]
    return _tokens(whole, original, RECOVERY_TOKENS_TASK, paths, digests)


def tokenize_gate(
    context: Context, model: Checkpoint, texts: Sequence[str]
) -> tuple[Manifest, list[str]]:
    """The windows of the calibration texts that steps are measured on, and warnings about them."""
    with context.stage("tokenize", 1):
        paths = _paths(context.job.calibration)
        tokens = _tokens(context, model, GATE_TOKENS_TASK, paths, texts)
    return tokens, _warnings(tokens)


def _warnings(tokens: Manifest) -> list[str]:
    found: Any = tokens.info["warnings"]
    return list(found)


def text_digests(context: Context) -> list[str]:
    """What every calibration text holds."""
    return [digest_of(Path(path)) for path in _paths(context.job.calibration)]


def _paths(spec: WindowsSpec) -> list[str]:
    return [text.path for text in spec.texts]


def _tokens(
    context: Context,
    model: Checkpoint,
    name: str,
    paths: Sequence[str],
    texts: Sequence[str],
    inputs: Mapping[str, object] = MappingProxyType({}),
) -> Manifest:
    """Tokenise what lies at these paths, once; depends on the texts, the tokenizer, the cutting and
    `inputs`, not on the rest of the job. `texts` are digests of those that are to be calibrated or
    trained on.
    """
    tokenizer = file_digests(side_files(model.path, (*TOKENIZER_FILES, *CHAT_TEMPLATES)))
    read = {"tokenizer": tokenizer, "texts": texts, **inputs}
    if not model.model.causal:
        read["windows of an encoder"] = {"masked": model.model.predicts_masked}
    task, executor = context.task(name, read), context.executor
    done = context.once(task, lambda: executor.wait([executor.on(0).tokenize(task)]))
    found: Any = done.info
    for path, facts in zip(paths, found["texts"], strict=True):
        context.emit("text", path=path, **facts)
    return done


def digest_of(text: Path) -> str:
    """What a text holds: the digest of a file, and the form that its name promises, or names and
    digests of a folder's files; nothing where it cannot be read, which the worker reports.
    """
    try:
        files = text_files(text)
        if files == [text]:
            return f"{record_of(text).sha256} {promised(text) or ''}".rstrip()
        return "\n".join(f"{file.name} {record_of(file).sha256}" for file in files)
    except (SpecError, OSError):
        return ""
