"""What can be said of a model folder of a type that there is no family of. No torch."""

import hashlib
import re
from collections import Counter
from pathlib import Path

from rayprune.specs.errors import ModelError
from rayprune.workers.model.families import listed, model_types
from rayprune.workers.model.folder import has_shards, read_config, read_headers

_NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")


def check_known(folder: Path) -> None:
    """Check that there is a family of a folder's type.

    Raises:
        ModelError: it is no model folder, or there is none: with what could be recognised of its
            layers.
    """
    config = read_config(folder)
    if config.model_type.replace("-", "_") not in model_types():
        raise ModelError(
            f"{config.file}: model_type {config.model_type!r} is not known; {_recognised(folder)}."
            f" Known are {listed()}. docs/adding-a-family.md: a new one is a small"
            " file"
        )


def _recognised(folder: Path) -> str:
    """What the headers say of layers."""
    if not has_shards(folder):
        return "there are no safetensors weights to look at"
    try:
        names = read_headers(folder, (), hashlib.sha256())
    except ModelError as error:
        return f"its weights could not be looked at ({error})"
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    if not numbered:
        return "no numbered layers could be recognised"
    place, _ = Counter(match[1] for match in numbered).most_common(1)[0]
    layers = {int(match[2]) for match in numbered if match[1] == place}
    first = f"{place}.{min(layers)}."
    inside = ", ".join(
        f"{name.removeprefix(first)} {'x'.join(map(str, info.shape))}"
        for name, info in sorted(names.items())
        if name.startswith(first)
    )
    return f"{len(layers)} layers at {place} could be recognised, with {inside}"
