"""Gemma 4 with its vision tower, and as E2B and E4B with one that hears: its text is pruned."""

from dataclasses import replace

from rayprune.workers.model.config import Config
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.gemma4_text import FAMILY as TEXT


class Gemma4(Backbone):
    """A backbone that may have ears."""

    def of(self, config: Config) -> Backbone:
        """The family as it is with a config: what hears is beside the text, too."""
        if config.raw.get("audio_config") is None:
            return self
        return replace(self, beside=(*self.beside, "model.audio_tower", "model.embed_audio"))


FAMILY = Gemma4(
    "Gemma4ForConditionalGeneration",
    TEXT,
    "gemma4_text",
    beside=("model.vision_tower", "model.embed_vision"),
    tied=True,
    older_names={},
)
