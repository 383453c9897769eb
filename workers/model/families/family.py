"""What a file of a family gives: a description of a model from its config, and forms to write it
in.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Model, RemoteCode
from rayprune.workers.model.form import AS_IT_IS, Form

MOST_LAYERS = 2**14
"""No model has more; each is described."""


class Family(ABC):
    """A model type. `architecture` is the class that transformers builds for it."""

    architecture: str

    def of(self, config: Config) -> "Family":
        """The family as it is with a config."""
        del config
        return self

    @abstractmethod
    def describe(self, config: Config) -> Model:
        """The model that a config says.

        Raises:
            ModelError: the config lacks a size, or its sizes do not fit.
        """

    @abstractmethod
    def form(self, config: Config, kept: Mapping[str, int], target: str) -> Form:
        """How a model is written that keeps so many units of each group in every layer.

        Raises:
            SpecError: no stock class can hold it.
        """

    @abstractmethod
    def count_layers(self, config: Config) -> int:
        """How many layers a config says."""

    @abstractmethod
    def keeping(self, config: Config, layers: Sequence[int]) -> dict[str, object]:
        """The keys that say that these layers stay, beside the lists."""

    def inside(self, config: Config) -> "tuple[Family, Config] | None":
        """The text model that is pruned, where it is part of a larger one, and its config."""
        del config
        return None

    def joined(self, config: Config, text: Mapping[str, object], dtype: str) -> dict[str, object]:
        """The whole config with another one of its text model."""
        raise NotImplementedError

    def code(self, config: Config) -> RemoteCode:
        """The class that builds models whose layers differ in size."""
        raise NotImplementedError

    def sized(self, config: Config, layers: Sequence[Mapping[str, int]]) -> dict[str, object]:
        """The keys from which that class takes the units of every layer."""
        raise NotImplementedError

    def layer_sizes(self, config: Config, kept: Mapping[str, int]) -> dict[str, object]:
        """What the config of one layer says of its sizes, where layers differ."""
        raise NotImplementedError

    def layer_form(self, config: Config, kept: Mapping[str, int]) -> Form:
        """How a layer is written that keeps so many units, where layers differ."""
        del config, kept
        return AS_IT_IS

    def layer_values(self, config: Config, layer: int) -> dict[str, object]:
        """What the config class works out from a layer's number, where the config has no list of
        it."""
        del config, layer
        return {}

    @property
    def lists(self) -> tuple[str, ...]:
        """Keys that hold a list with an entry for each layer."""
        return ("layer_types", "no_rope_layers", "attention_layers")
