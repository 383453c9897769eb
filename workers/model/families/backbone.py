"""Models that hold a text model beside what they see with: the text model is pruned, everything
else goes along as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Model
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.family import Family
from rayprune.workers.model.form import Form

_LLAVA = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""Names in published files, and what modules are called today."""
_TYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Backbone(Family):
    """A family that holds a decoder; the defaults are LLaVA's kin."""

    architecture: str
    text: Decoder
    """The family of the text model."""
    text_type: str
    """Its type."""
    at: str = "model.language_model"
    """Where it sits."""
    beside: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector")
    """Modules that text does not pass through."""
    head: str = "lm_head.weight"
    predictor: str = ""
    """The module that predicts from token ids, where the class does not; empty: the class does."""
    tied: bool = False
    """Whether the head is the embedding matrix where the config does not say."""
    tied_by: Literal["whole", "text", "either"] = "whole"
    """Which config's `tie_word_embeddings` the class goes by: the whole one's, the text model's, or
    either's.
    """
    older_names: Mapping[str, str] = field(default_factory=lambda: _LLAVA)
    """What names began with in older files: theirs to today's."""
    missing: Mapping[str, object] = field(default_factory=dict)
    """What the text model's class takes for sizes that published configs leave out."""

    def part(self, config: Config) -> Config:
        """The text model's config, by itself.

        Raises:
            ModelError: there is none, or it is of another type.
        """
        given = config.raw.get("text_config")
        if not isinstance(given, Mapping):
            raise config.wrong(
                "text_config",
                "the config of the text model",
                remedy="load the model with transformers 5, and save it",
            )
        if given.get("model_type", self.text_type) != self.text_type:
            raise ModelError(
                f"{config.file}: text_config is of model_type {given['model_type']!r}; of a"
                f" {config.model_type} only {self.text_type} is pruned"
            )
        whole = config.flag("tie_word_embeddings", self.tied)
        text = Config(given, f"{config.file}: text_config").flag("tie_word_embeddings")
        tied = {"whole": whole, "text": text, "either": whole or text}[self.tied_by]
        named = {key: config.raw[key] for key in _TYPES if key in config.raw}
        # null is a value of its own: no sliding window
        own = {k: value for k, value in given.items() if not (value is None and k in self.missing)}
        forced = {"model_type": self.text_type, "tie_word_embeddings": tied}
        return Config({**self.missing, **named, **own, **forced}, f"{config.file}: text_config")

    def inside(self, config: Config) -> tuple[Family, Config]:
        """The text model, and its config."""
        part = self.part(config)
        return self.text.of(part), part

    def joined(self, config: Config, text: Mapping[str, object], dtype: str) -> dict[str, object]:
        """The whole config with another one of the text model."""
        given = config.raw["text_config"]
        assert isinstance(given, Mapping)
        ours = {"tie_word_embeddings", *_TYPES} - given.keys()
        own = {key: value for key, value in text.items() if key not in ours}
        whole = {**config.raw, "text_config": own}
        named = [key for key in _TYPES if key in whole] or ["dtype"]
        return whole if dtype == "auto" else whole | dict.fromkeys(named, dtype)

    def describe(self, config: Config) -> Model:
        """The text model, by the names that it has in the whole one.

        Raises:
            ModelError: the config names another class.
        """
        if config.raw.get("architectures") not in (None, [self.architecture]):
            raise config.wrong("architectures", f"[{self.architecture!r}]")
        family, part = self.inside(config)
        model = family.describe(part)
        return replace(
            model,
            model_type=config.model_type,
            auto_class=self.architecture,
            layers_at=self._named(model.layers_at),
            backbone=self.at,
            last_norm=self._named(model.last_norm),
            outer={self._named(name): shape for name, shape in model.outer.items()},
            embedding=self._named(model.embedding),
            head=self.head,
            predictor=self.predictor,
            layer_axes=tuple(
                replace(axis, tensor=self._named(axis.tensor)) for axis in model.layer_axes
            ),
            left_out=tuple(map(self._named, model.left_out)),
            beside=self.beside,
            older_names=self.older_names,
            open_outside=True,
            sized_alike="the text model of a larger one cannot be built with layers of sizes of"
            " their own",
        )

    def _named(self, name: str) -> str:
        if name == self.text.head:
            return self.head
        start = f"{self.text.backbone}."
        return f"{self.at}.{name.removeprefix(start)}" if name.startswith(start) else name

    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """How the text model is written.

        Raises:
            SpecError: its own class cannot hold it: it is of no other one here.
        """
        family, part = self.inside(config)
        return family.form(part, kept, target)

    def count_layers(self, config: Config) -> int:
        """How many layers the text model has."""
        return self.text.count_layers(self.part(config))

    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The keys of the text model that say that these layers stay."""
        family, part = self.inside(config)
        return family.keeping(part, layers)

    def layer_sizes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        """What the text model's config says of a layer that keeps so many units."""
        family, part = self.inside(config)
        return family.layer_sizes(part, kept)

    def layer_values(self, config: Config, layer: int) -> dict[str, object]:
        """What the text model's class works out from a layer's number."""
        return self.text.layer_values(self.part(config), layer)
