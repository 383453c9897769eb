"""Text of the model's own, planned: its batches, and what they take of a worker."""

import math
from dataclasses import dataclass

from rayprune.specs.job import JobSpec
from rayprune.specs.own_text import OwnTextSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.store.layout import OWN_TEXT_TASK, own_task
from rayprune.workers.texts.limits import own_tokens
from rayprune.workers.texts.own import longest_prompt, vllm_cached


def batches_of(own: OwnTextSpec, tokens: int) -> list[list[int]]:
    """Lengths of the documents of every batch that together have so many tokens; the last one has
    what is left, so that nothing waits for more.
    """
    count = math.ceil(tokens / own.length)
    lengths = [own.length] * (count - 1) + [tokens - (count - 1) * own.length]
    return [lengths[start : start + own.batch] for start in range(0, count, own.batch)]


def own_tasks(job: JobSpec) -> tuple[str, ...]:
    """The tasks in which the model writes; what is dropped as loops is made up for by more.

    Raises:
        SpecError: it is to write fewer tokens than are read.
    """
    if (own := job.calibration.own) is None:
        return ()
    return (*map(own_task, range(len(batches_of(own, own_tokens(job))))), OWN_TEXT_TASK)


@dataclass(frozen=True)
class OwnTextLoad:
    """What the model writes itself, as far as costs go; loops are not counted."""

    batches: tuple[tuple[int, int], ...]
    """Documents of every batch, and tokens of its longest one, each computed by itself."""
    prompt: int
    """Tokens before them."""
    element_bytes: int
    """Of the type in which it is written."""
    cached_bytes: int
    """Keys and values that the cache keeps of one token."""
    most_cached: int
    """Tokens of the largest cache."""
    engine: str
    """What computes it, one of `OwnTextSpec.engine`."""

    @property
    def tokens(self) -> int:
        """That go through the model."""
        return sum(count * (self.prompt + length) for count, length in self.batches)

    @property
    def most_documents(self) -> int:
        """Documents that are written together."""
        return max(count for count, _ in self.batches)


def own_text_load(job: JobSpec, checkpoint: Checkpoint, element_bytes: int) -> OwnTextLoad | None:
    """What a job has the model write; `element_bytes` of the type in which it does.

    Raises:
        SpecError: it asks for fewer tokens than it reads.
    """
    if (own := job.calibration.own) is None:
        return None
    batches = [(len(lengths), max(lengths)) for lengths in batches_of(own, own_tokens(job))]
    prompt = longest_prompt(own)
    return OwnTextLoad(
        batches=tuple(batches),
        prompt=prompt,
        element_bytes=element_bytes,
        cached_bytes=checkpoint.model.cached_numbers * element_bytes,
        most_cached=(
            vllm_cached(own.batch, prompt + own.length)
            if own.engine == "vllm"
            else max(documents * (prompt + length) for documents, length in batches)
        ),
        engine=own.engine,
    )
