"""What text a job is calibrated on."""

from typing import Self

from pydantic import Field, model_validator

from rayprune.specs.own_text import OwnTextSpec
from rayprune.specs.texts import OwnDocuments, WindowsSpec

FEW_TOKENS = 10
"""Calibration tokens per FFN channel below which corrections overfit, measured on SmolLM2-135M
(docs/methods/stat.md).
"""


class CalibrationSpec(WindowsSpec):
    """The text whose activations decide what is kept."""

    own: OwnTextSpec | None = None
    """Text that the model writes itself, as the last text of the mix; null: none."""
    shards: int = Field(default=8, ge=2, le=4096)
    """Number of logical shards the windows are split into, in order; at most one worker per shard.
    Part of the result.
    """
    held_out_shards: int = Field(default=1, ge=1)
    """How many of the last shards are held out while the damping is chosen (the final fit uses all
    of them).
    """

    @model_validator(mode="after")
    def _shards_fit(self) -> Self:
        if self.shards > self.samples:
            raise ValueError(f"shards ({self.shards}) must not exceed samples ({self.samples})")
        if self.held_out_shards >= self.shards:
            raise ValueError(
                f"held_out_shards ({self.held_out_shards}) must be smaller than shards"
                f" ({self.shards})"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of the texts, and last the one of the model's own, as long as it is not written."""
        return (*super().weights, *([self.own.weight] if self.own else []))

    def with_own(self, path: str) -> "CalibrationSpec":
        """The same where the model's own text lies in a file: one more of the mix, whose documents
        are read as the tokens that the model has written.
        """
        if self.own is None:
            return self
        text = OwnDocuments(path=path, format="jsonl", field="input_ids", weight=self.own.weight)
        return self.model_copy(update={"mix": (*self.mix, text), "own": None})
