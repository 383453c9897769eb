"""The tokens of a job's texts, and what is checked of them before any other work."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayprune.specs.job import JobSpec
from rayprune.workers.calibration import (
    Frame,
    ReadText,
    frame_of,
    load_tokenizer,
    masked,
    opening_of,
    read_behind,
    read_calibration,
    read_evaluation,
)
from rayprune.workers.model.checkpoint import Checkpoint, planned_checkpoint
from rayprune.workers.texts.checks import check_apart, check_gate_apart, check_known, check_varied
from rayprune.workers.texts.limits import check_positions, embedding_rows


@dataclass(frozen=True)
class Tokens:
    """Windows (S, T), the texts that they are from, and warnings; of a masked-language model's
    evaluation also the windows in which some tokens are masked.
    """

    windows_ST: Tensor
    texts: list[ReadText]
    warnings: list[str]
    masked_ST: Tensor | None = None
    opening: str = ""
    """What windows of a decoder's evaluation begin with in place of their own tokens; empty:
    nothing.
    """


@dataclass(frozen=True)
class JobTexts:
    """The texts of a job, tokenised for its model."""

    job: JobSpec
    checkpoint: Checkpoint

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""
        return load_tokenizer(self.checkpoint.path)

    @cached_property
    def frame(self) -> Frame:
        """What stands around every window. An encoder reads texts as wholes, so each has the
        special tokens that its tokenizer puts around a text; a decoder's begins as texts do.
        """
        causal = self.checkpoint.model.causal
        return opening_of(self.tokenizer) if causal else frame_of(self.tokenizer)

    def calibration(self) -> Tokens:
        """The calibration windows; what only a training reads is checked too.

        Raises:
            SpecError: a text is too short, or says nothing.
            ModelError: the model has no embedding for a token.
        """
        spec = self.job.calibration
        windows_ST, texts = read_calibration(spec, self.tokenizer, self.frame)
        read = self._all_read()[1] if self._reads_more else texts
        warnings = self._checked(read, spec.sequence_length, "calibration.sequence_length")
        return Tokens(windows_ST, texts, warnings)

    def gate(self) -> Tokens:
        """The windows that steps are measured on: behind all that are calibrated or trained on.

        Raises:
            SpecError: a text is too short, or says nothing.
            ModelError: the model has no embedding for a token.
        """
        spec, steps = self.job.calibration, self.job.steps
        assert steps is not None
        totals = (spec.samples, self.job.windows_read)
        windows_ST, texts = read_behind(
            spec, totals, steps.gate.samples, self.tokenizer, self.frame
        )
        read = [text for text in texts if len(text.windows_NT)]
        warnings = self._checked(read, spec.sequence_length, "calibration.sequence_length")
        return Tokens(windows_ST, texts, warnings)

    def recovery(self) -> Tokens:
        """The windows that a recovery is trained and measured on.

        Raises:
            SpecError: a text is too short, or says nothing, or a gate looks at it.
            ModelError: the model has no embedding for a token.
        """
        spec, option = self.job.recovery_text, self.job.recovery_option
        windows_ST, texts = read_calibration(spec, self.tokenizer, self.frame, option)
        warnings = self._checked(texts, spec.sequence_length, f"{option}.sequence_length")
        if self.job.steps and self._trains_on_other_text:
            check_gate_apart(windows_ST, self.gate().windows_ST, spec.path)
        return Tokens(windows_ST, texts, warnings)

    def evaluation(self, calibration_ST: Tensor) -> Tokens:
        """The evaluation windows of a job that has some, text after text.

        Raises:
            SpecError: a text is too short, says nothing, or was calibrated or trained on.
            ModelError: the model has no embedding for a token.
        """
        spec = self.job.evaluation
        assert spec is not None
        texts = {
            name: read_evaluation(spec, text, self.tokenizer, self.frame)
            for name, text in spec.by_name.items()
        }
        read = list(texts.values())
        warnings = self._checked(read, spec.window, "evaluation.window")
        read_ST = self.all_read(calibration_ST)
        if self.job.steps:
            read_ST = torch.cat([read_ST, self.gate().windows_ST])
        others = [read_ST, *([self.recovery().windows_ST] if self._trains_on_other_text else [])]
        for name, text in texts.items():
            for other_ST in others:
                warnings += check_apart(other_ST, text.windows_NT, spec.option(name), text.path)
        windows_NT, masked_NT = torch.cat([text.windows_NT for text in read]), None
        if self.checkpoint.model.predicts_masked:
            masked_NT = torch.cat([masked(text.windows_NT, self.tokenizer) for text in read])
        replaced = next((text.opening for text in read if text.opening), ())
        opening = "".join(self.tokenizer.convert_ids_to_tokens(list(replaced)))
        return Tokens(windows_NT, read, warnings, masked_NT, opening)

    def all_read(self, given_ST: Tensor) -> Tensor:
        """All windows that the job reads of its calibration text: those of the calibration,
        `given`, unless a training takes more (S, T).
        """
        return self._all_read()[0] if self._reads_more else given_ST

    @property
    def _trains_on_other_text(self) -> bool:
        return self.job.recover is not None and self.job.recover.text is not None

    @property
    def _reads_more(self) -> bool:
        """Whether a training takes more windows than the calibration."""
        return self.job.windows_read > self.job.calibration.samples

    def _all_read(self) -> tuple[Tensor, list[ReadText]]:
        reader, samples = self.job.most_read
        read = self.job.calibration.model_copy(update={"samples": samples})
        return read_calibration(read, self.tokenizer, self.frame, reader=reader)

    def _checked(self, texts: list[ReadText], length: int, option: str) -> list[str]:
        rows = embedding_rows(self.checkpoint)
        for text in texts:
            check_known(text.windows_NT, rows, text.path, text.facts)
        return check_positions(self.checkpoint, length, option) + [
            warning for text in texts for warning in check_varied(text.windows_NT, text.path)
        ]


def check_tokens(job: JobSpec) -> list[str]:
    """Tokenise all texts of a job and check them, as a run does first; warnings.

    Raises:
        SpecError: a text will not do.
        ModelError: the model or its tokenizer will not do.
    """
    texts = JobTexts(job, planned_checkpoint(Path(job.model.path)))
    calibration = texts.calibration()
    found = calibration.warnings
    if job.steps:
        found = found + texts.gate().warnings
    if job.recover:
        found = found + texts.recovery().warnings
    if job.evaluation:
        found = found + texts.evaluation(calibration.windows_ST).warnings
    return list(dict.fromkeys(found))
