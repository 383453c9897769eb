"""Texts that a job names, and how they are cut into windows."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rayprune.specs.section import Section

MOST_SAMPLES = 1_000_000
"""Windows that anything takes."""


@dataclass(frozen=True)
class PathMarker:
    """Marks a field that holds a path, so that the loader can resolve it against the job file's
    folder.
    """

    or_name: bool = False
    """Whether OWNER/NAME, where there is no such folder, is left as it is: a name on the Hugging
    Face Hub.
    """


LocalPath = Annotated[str, Field(min_length=1), PathMarker()]
TextFormat = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "npy"]


class TextSpec(Section):
    """A text, tokenised once as a whole and cut into windows."""

    path: LocalPath
    """File of plain text, JSON, a table or token ids, compressed or not, or a folder of such
    files.
    """
    format: TextFormat = "auto"
    """How a file is read; `auto`: as its content says, and its name where the content may be
    several things.
    """
    field: Annotated[str, Field(min_length=1)] | None = None
    """The key or column that holds a document (a text, a chat or token ids), `a.b` for a key inside
    another; null: `text`, `content`, `messages`, `conversations`, `input_ids`, or the only one that
    holds text.
    """


class MixedTextSpec(TextSpec):
    """A further text beside the first."""

    weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """Windows taken from it, for each one taken from the first text."""


class OwnDocuments(MixedTextSpec):
    """What the model has written: token ids, of which windows are cut as of a text."""


class WindowsSpec(TextSpec):
    """Windows of one text or of several."""

    mix: tuple[MixedTextSpec, ...] = Field(default=(), max_length=64)
    """Further texts: windows of all of them alternate, in proportion to their weights; the first
    text's is 1.
    """
    samples: int = Field(default=128, ge=2, le=MOST_SAMPLES)
    """Number of windows, taken from the start of each text."""
    sequence_length: int = Field(default=2048, ge=8, le=1_048_576)
    """Length of one window, in tokens."""
    bos: bool = True
    """Whether every window of a text begins with what a decoder's tokenizer puts before one (often
    BOS, often nothing), in place of the window's first tokens; without it models that know nothing
    else are far from themselves. Token ids are taken as they are.
    """

    @property
    def texts(self) -> tuple[TextSpec, ...]:
        """The texts that are there before the run."""
        return (self, *self.mix)

    @property
    def weights(self) -> tuple[float, ...]:
        """In which proportion windows are taken from them."""
        return (1.0, *(text.weight for text in self.mix))
