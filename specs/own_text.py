"""Text that the model writes itself, to be calibrated on beside the other texts."""

from typing import Annotated, Literal

from pydantic import Field

from rayprune.specs.section import FloatType, Section, Seed

OWN_TEXT = "the model's own text"
"""What stands for its path before it is written."""
OWN_LENGTH = "calibration.own.length"
"""What its documents' length is called."""


class OwnTextSpec(Section):
    """Documents that the model samples before anything else, one more text of the mix."""

    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens that are written; `auto`: as many as are read of them, fewer are refused."""
    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Windows taken from it, for each one taken from the first text."""
    prompts: Literal["auto", "calibration", "chat", "none"] = "auto"
    """What a document goes on from: pieces of the first calibration text, which are left out of
    it; the model's chat template, of which the model writes both sides; or nothing but the first
    token. `auto`: `chat` where the model has a template that goes around every turn, else
    `calibration`.
    """
    length: int = Field(default=512, ge=8, le=1_048_576)
    """Tokens of a document, prompt not counted."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Of the sampling, from all tokens; 1: the model's own distribution."""
    dtype: FloatType = "auto"
    """Floating-point type in which it is written; `auto`: that of `model.dtype`."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What computes it: transformers, every family; or vLLM, on one device, where it is installed
    and knows the model: faster, and documents part from the others' where rounding tips a draw.
    """
    batch: int = Field(default=32, ge=1, le=65_536)
    """Documents that a worker writes together, a task of its own. Part of the result."""
    seed: Seed = 0
    """Of the samples; every document has random numbers of its own."""
