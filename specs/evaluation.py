"""On what texts and tasks the result is measured."""

import os
from typing import Annotated, Self

from pydantic import Field, model_validator

from rayprune.specs.section import Section
from rayprune.specs.texts import LocalPath, TextFormat, TextSpec

TextName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class EvaluationSpec(Section):
    """Perplexity of the dense and of the exported model, under the same code, and how close they
    are; of an encoder how alike its embeddings are, and its loss on masked tokens if it predicts
    them.
    """

    path: LocalPath | None = None
    """The text, as in `calibration`; null: `texts` has several."""
    format: TextFormat = "auto"
    """As in `calibration`."""
    field: Annotated[str, Field(min_length=1)] | None = None
    """As in `calibration`."""
    texts: dict[TextName, TextSpec] | None = None
    """Texts by name, in place of `path`: each is measured by itself, and all of them together."""
    window: int = Field(default=1024, ge=2, le=1_048_576)
    """Length of one window, in tokens."""
    bos: bool = True
    """As in `calibration`. `false` is how most papers' tables were measured."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between the starts of two windows; null: the window's length (no overlap)."""
    max_windows: int | None = Field(default=None, ge=1)
    """Only the first so many windows of each text; null: all. An incomplete last window is
    dropped.
    """
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=32)
    """Beginnings of texts that the dense and the pruned model go on with, for the report; each
    takes the likeliest token.
    """
    prompt_tokens: int = Field(default=48, ge=1, le=4096)
    """Tokens that they go on with, at most."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tasks of lm-eval by their names, or groups of them, that every model is asked."""
    tasks_folder: LocalPath | None = None
    """Folder with tasks of your own, as YAML and data; its names go before lm-eval's."""
    tasks_limit: int | None = Field(default=None, ge=1)
    """Only the first so many documents of each task; null: all."""
    tasks_batch: int = Field(default=1, ge=1, le=1024)
    """Questions that a model is asked at once."""
    few_shot: int | None = Field(default=None, ge=0, le=1024)
    """Examples before each question; null: as many as the task says."""

    @property
    def by_name(self) -> dict[str, TextSpec]:
        """The texts; one that stands alone has the name of its file."""
        if self.path is None:
            return dict(self.texts or {})
        alone = TextSpec(path=self.path, format=self.format, field=self.field)
        return {os.path.basename(os.path.normpath(self.path)) or "text": alone}

    def option(self, name: str) -> str:
        """The option that says where the text of this name lies."""
        return "evaluation.path" if self.texts is None else f"evaluation.texts.{name}.path"

    @property
    def effective_stride(self) -> int:
        """Tokens between the starts of two windows."""
        return self.stride or self.window

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.path is None) == (not self.texts):
            raise ValueError("give either path, or texts by name: texts: {NAME: {path: FILE}}")
        if self.texts and (self.format, self.field) != ("auto", None):
            raise ValueError("with texts, format and field belong to each of them: move them there")
        return self

    @model_validator(mode="after")
    def _options_of_what_is_asked(self) -> Self:
        idle = self.given("few_shot", "tasks_batch", "tasks_folder", "tasks_limit")
        if idle and not self.tasks:
            raise ValueError(f"{idle[0]}: there are no tasks; give tasks: [NAME], or leave it out")
        if not self.prompts:
            self.leave_out("there are no prompts", "prompt_tokens")
        return self

    @model_validator(mode="after")
    def _stride_within_window(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride ({self.stride}) must not exceed window ({self.window})")
        return self
