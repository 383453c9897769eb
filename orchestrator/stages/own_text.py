"""The stage in which the model writes text of its own, some documents at a time, each batch a task.

A batch follows from its documents' numbers and lengths alone, whoever writes it. All workers write
one at the same time; what is dropped as a loop is made up for by further documents, until there is
enough. Then the documents become one file.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rayprune.orchestrator.planning.own_text import batches_of
from rayprune.orchestrator.stages import source
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import digests, file_digests
from rayprune.orchestrator.stages.texts import digest_of
from rayprune.specs.errors import ModelError
from rayprune.specs.job import JobSpec
from rayprune.specs.own_text import OWN_TEXT
from rayprune.specs.texts import WindowsSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.files import Manifest, Task, commit, read_manifest, write_text
from rayprune.workers.store.layout import OWN_FILE, OWN_TEXT_TASK, own_task
from rayprune.workers.store.side_files import CHAT_TEMPLATES, TOKENIZER_FILES, side_files
from rayprune.workers.texts.limits import own_tokens, with_own

STAGE = "own text"
FEWEST_KEPT, FEWEST_DOCUMENTS = 0.1, 8
"""This part of all documents has to be none of loops, once so many are written."""


def with_own_text(context: Context, checkpoint: Checkpoint) -> Context:
    """The context whose job has the model's own text among its calibration texts, written first
    where the job asks for it.

    Raises:
        ModelError: the model writes little but loops.
        RaypruneError: as its subclasses say; finished batches are kept.
    """
    if context.job.calibration.own is None:
        return context
    job = with_own(context.job, str(write_own_text(context, checkpoint)))
    context.executor.use_model(job, checkpoint.path, context.scope.name)
    return replace(context, job=job)


def trained_text(job: JobSpec) -> WindowsSpec | None:
    """What a recovery is trained on, the model's own text among it; None: there is none."""
    return with_own(job, OWN_TEXT).recovery_text if job.recover else None


def write_own_text(context: Context, checkpoint: Checkpoint) -> Path:
    """The file of the model's own text, with as many tokens as the job asks for at least.

    Raises:
        ModelError: the model writes little but loops.
        RaypruneError: as its subclasses say; finished batches are kept.
    """
    writing = _Writing(context, _given(context, checkpoint), own_tokens(context.job))
    with context.stage(STAGE, len(batches_of(writing.own, writing.needed))):
        while (missing := writing.needed - writing.kept) > 0:
            writing.write(missing)
    task = context.task(OWN_TEXT_TASK, digests(writing.done))
    context.once(task, lambda: _join(task, writing))
    return task.folder / OWN_FILE


def _given(context: Context, checkpoint: Checkpoint) -> dict[str, object]:
    """What every batch depends on besides its documents."""
    model, calibration = source.identify(context, checkpoint), context.job.calibration
    assert calibration.own is not None
    names = (*TOKENIZER_FILES, *CHAT_TEMPLATES, "generation_config.json")
    given: dict[str, object] = {
        "model": model.identity,
        "tokenizer": file_digests(side_files(checkpoint.path, names)),
    }
    if calibration.own.prompts not in ("auto", "calibration"):
        return given
    text = {"holds": digest_of(Path(calibration.path)), "format": calibration.format}
    return given | {"prompts": text | {"field": calibration.field}}


@dataclass(frozen=True)
class _Batch:
    """Documents that are written together."""

    task: Task
    first: int
    lengths: tuple[int, ...]


class _Writing:
    """What is written so far."""

    def __init__(self, context: Context, given: dict[str, object], needed: int) -> None:
        assert context.job.calibration.own is not None
        self._context, self._given, self.own = context, given, context.job.calibration.own
        self.needed, self.done = needed, list[Manifest]()
        self._documents = 0
        """That were begun."""

    @property
    def kept(self) -> int:
        """Tokens that are none of loops."""
        return self.total("tokens")

    @property
    def prompts(self) -> str:
        """What its documents go on from."""
        found: Any = self.done[0].info["result"]
        return str(found["prompts"])

    def total(self, name: str) -> int:
        """A number that batches tell, summed over all of them."""
        found: list[Any] = [done.info["result"] for done in self.done]
        return sum(each[name] for each in found)

    def write(self, tokens: int) -> None:
        """Write so many tokens, of which some may be dropped.

        Raises:
            ModelError: nearly all are.
        """
        batches = []
        for number, lengths in enumerate(batches_of(self.own, tokens), len(self.done)):
            documents = {"first document": self._documents, "lengths": lengths}
            task = self._context.task(own_task(number), self._given | documents)
            batches.append(_Batch(task, self._documents, tuple(lengths)))
            self._documents += len(lengths)
        at_once = self._context.executor.num_workers
        for start in range(0, len(batches), at_once):
            self._wave(batches[start : start + at_once])
        kept = self.total("documents")
        if self._documents >= FEWEST_DOCUMENTS and kept < FEWEST_KEPT * self._documents:
            raise ModelError(
                f"{self._context.executor.job.model.path}: writes little but loops: of"
                f" {self._documents} documents {self.total('dropped')} repeat themselves; raise"
                " calibration.own.temperature, change its prompts, or leave calibration.own out"
            )

    def _wave(self, batches: Sequence[_Batch]) -> None:
        """Batches that are written at the same time, one by each worker."""
        context, found, start = self._context, dict[str, Manifest](), time.monotonic()
        for batch in batches:
            if done := context.finished(batch.task):
                found[batch.task.name] = done
        left = [batch for batch in batches if batch.task.name not in found]
        if left:
            context.attempt(left[0].task.name, partial(self._write, left))
        found |= {batch.task.name: context.done(batch.task) for batch in left}
        self.done += [found[batch.task.name] for batch in batches]
        tokens = sum(sum(batch.lengths) for batch in left)
        rate = {"tokens_per_second": tokens / (time.monotonic() - start)} if left else {}
        context.emit(
            "text-written",
            stage=STAGE,
            tasks=[batch.task.name for batch in batches],
            done=self.kept,
            of=self.needed,
            documents=self.total("documents"),
            dropped=self.total("dropped"),
            peak_memory_bytes=context.peak_memory_bytes(),
            **rate,
        )

    def _write(self, batches: Sequence[_Batch]) -> None:
        """Those of them that no earlier attempt has written."""
        executor = self._context.executor
        left = [batch for batch in batches if read_manifest(batch.task.folder) is None]
        calls = [
            executor.on(worker).write_own(batch.task, batch.first, batch.lengths)
            for worker, batch in enumerate(left)
        ]
        executor.wait(calls)


def _join(task: Task, writing: _Writing) -> None:
    """All documents in one file."""
    folders = [task.folder.with_name(done.task) for done in writing.done]
    texts = [(folder / OWN_FILE).read_text(encoding="utf-8") for folder in folders]
    write_text(task.folder / OWN_FILE, "".join(texts))
    numbers = {name: writing.total(name) for name in ("documents", "dropped", "tokens")}
    commit(task, [OWN_FILE], {"result": {**numbers, "prompts": writing.prompts}})
