"""The model families: one small file each, found by its model type.

A file `families/<model_type>.py` defines `FAMILY`. Nothing else has to know of it.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from rayprune.specs.errors import ModelError
from rayprune.workers.model.config import Config
from rayprune.workers.model.families.family import Family

_SHARED = ("as_phi", "backbone", "decoder", "encoder", "family", "latent", "mixture", "parts")
"""Modules of this folder that are no families."""
_HYPHENATED = ("deberta-v2", "xlm-roberta")
"""Model types that no module can be named by."""


@cache
def model_types() -> tuple[str, ...]:
    """All model types that there are files of, in alphabetical order."""
    return tuple(sorted(m.name for m in iter_modules(__path__) if m.name not in _SHARED))


@cache
def family_named(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        KeyError: there is no file of it.
    """
    if model_type.replace("-", "_") not in model_types():
        raise KeyError(model_type)
    family = import_module(f"{__name__}.{model_type.replace('-', '_')}").FAMILY
    assert isinstance(family, Family)
    return family


def listed() -> str:
    """All of them in one line, as configs spell them."""
    spelled = {name.replace("-", "_"): name for name in _HYPHENATED}
    return ", ".join(spelled.get(name, name) for name in model_types())


def family_of(config: Config) -> Family:
    """The family of a config, as it is with it.

    Raises:
        ModelError: the model type is not supported.
    """
    try:
        return family_named(config.model_type).of(config)
    except KeyError:
        raise ModelError(
            f"{config.file}: model_type {config.model_type!r} is not supported; supported are"
            f" {listed()}"
        ) from None
