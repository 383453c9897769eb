"""Gemma 4 with its vision tower, as of its dense 31B and its 26B with experts: the text model is
pruned.
"""

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import Config
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.gemma4_text import FAMILY as TEXT


class Gemma4(Backbone):
    """A backbone that may have ears."""

    def part(self, config: Config) -> Config:
        """The text model's config, by itself.

        Raises:
            ModelError: the model hears, too.
        """
        if config.raw.get("audio_config") is not None:
            raise ModelError(f"{config.file}: audio_config is not supported for gemma4")
        return super().part(config)


FAMILY = Gemma4(
    "Gemma4ForConditionalGeneration",
    TEXT,
    "gemma4_text",
    beside=("model.vision_tower", "model.embed_vision"),
    tied=True,
    older_names={},
)
