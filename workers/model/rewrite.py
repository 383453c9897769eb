"""The exported config: the original's keys, patched, never re-saved (transformers would drop keys
that older readers need). No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayprune.workers.model.config import Config
from rayprune.workers.model.description import RemoteCode
from rayprune.workers.model.families import family_of
from rayprune.workers.model.families.family import Family
from rayprune.workers.model.form import Form
from rayprune.workers.model.older import readable_by_both

_NOT_WRITTEN = ("auto_map", "_name_or_path")


@dataclass(frozen=True)
class Written:
    """A pruned model's config, and the class beside it where layers differ in size."""

    config: dict[str, object]
    code: RemoteCode | None = None

    @property
    def model_type(self) -> str:
        """The type it is written as."""
        return Config(self.config).model_type


def form_of(config: Config, kept: Mapping[str, int], target: str) -> Form:
    """How a model is written that keeps so many units of each group in every layer.

    Raises:
        SpecError: no stock class can hold it.
    """
    return family_of(config).form(config, kept, target)


def written(
    config: Config,
    there: Sequence[int],
    layers: Sequence[Mapping[str, int]],
    target: str,
    dtype: str,
) -> Written:
    """The config of a model that keeps the layers `there`, each with so many units.

    Raises:
        SpecError: no stock class can hold it.
    """
    family = family_of(config)
    if (inside := family.inside(config)) is None:
        return _written(family, config, there, layers, target, dtype)
    text = _written(*inside, there, layers, target, dtype)
    whole = family.joined(config, text.config, dtype)
    return Written({key: value for key, value in whole.items() if key not in _NOT_WRITTEN})


def _written(
    family: Family,
    config: Config,
    there: Sequence[int],
    layers: Sequence[Mapping[str, int]],
    target: str,
    dtype: str,
) -> Written:
    cut = of_layers(config, there, family)
    model = family.describe(config)
    if all(kept == layers[0] for kept in layers) and model.is_stock(layers[0]):
        return Written(_patched(family, cut, layers[0], target, dtype))
    return _of_sizes(family, cut, layers, dtype)


def _patched(
    family: Family, config: Config, kept: Mapping[str, int], target: str, dtype: str
) -> dict[str, object]:
    form = family.form(config, kept, target)
    left_out = (*_NOT_WRITTEN, *form.dropped)
    result = {key: value for key, value in config.raw.items() if key not in left_out}
    changes = dict(form.changes)
    if dtype != "auto":
        named = [key for key in ("dtype", "torch_dtype") if key in config.raw] or ["dtype"]
        changes |= dict.fromkeys(named, dtype)
    own = {form.renamed.get(key, key): value for key, value in (result | changes).items()}
    return readable_by_both(own)


def _of_sizes(
    family: Family, config: Config, layers: Sequence[Mapping[str, int]], dtype: str
) -> Written:
    """Layers that keep different numbers of units; sizes of the whole stay those of the
    original.
    """
    model = family.describe(config)
    code = family.code(config)
    result = _patched(family, config, model.units, "transformers", dtype)
    own = family.sized(config, layers) | {"auto_map": code.auto_map(model.auto_class)}
    return Written(result | own, code)


def of_layers(config: Config, layers: Sequence[int], family: Family | None = None) -> Config:
    """The config of a model that keeps only these layers; lists with an entry for each layer are
    cut with them.

    Lists that the config class would work out from a layer's number are written, unless all entries
    are alike: numbers change.
    """
    family = family or family_of(config)
    if len(layers) == family.count_layers(config):
        return config
    lists = _layer_lists(family, config).items()
    cut = {key: [values[n] for n in layers] for key, values in lists}
    changed = family.keeping(config, layers)
    return Config({**config.raw, **cut, **changed})


def _layer_lists(family: Family, config: Config) -> dict[str, list[object]]:
    """Lists of the config with an entry for each layer, and those that its class works out from a
    layer's number, unless all are alike.
    """
    count = family.count_layers(config)
    values = [family.layer_values(config, layer) for layer in range(count)]
    derived = {
        key: found for key in values[0] if len(set(found := [value[key] for value in values])) > 1
    }
    given = {key: config.raw.get(key) for key in family.lists}
    return derived | {
        key: value
        for key, value in given.items()
        if isinstance(value, list) and len(value) == count
    }
