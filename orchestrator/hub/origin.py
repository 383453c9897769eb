"""Where a model folder comes from: its name on the Hub, and the licence that its card names."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from rayprune.specs.errors import ModelError
from rayprune.specs.files import read_document, within
from rayprune.workers.store.layout import CARD_FILE

MAX_CARD_BYTES = 2**20
_CACHED = re.compile(r".*/models--([\w.-]+)/snapshots/([0-9a-f]+)")
NAMELESS = "model"
"""A folder's name that says nothing."""
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """What is known of a dense model besides its values."""

    name: str
    """What it is called: its name on the Hub without the owner, or its folder's; of one that is
    called `model` the name of the folder around it.
    """
    hub_id: str | None
    """OWNER/NAME, where the folder lies in the Hub's cache; a path alone tells none."""
    revision: str | None
    """The commit there."""
    licence: dict[str, str]
    """What its card says of its licence, by the Hub's keys; empty if it says nothing."""


def origin_of(folder: Path) -> Origin:
    """Look at a folder's path and at the head of its card."""
    cached = _CACHED.fullmatch(folder.as_posix())
    hub_id, revision = (cached[1].replace("--", "/"), cached[2]) if cached else (None, None)
    named = folder.parent if folder.name == NAMELESS and folder.parent.name else folder
    return Origin((hub_id or named.name).rpartition("/")[2], hub_id, revision, _licence(folder))


def _licence(folder: Path) -> dict[str, str]:
    """Of a card that cannot be read: nothing."""
    try:
        card = within(folder, folder / CARD_FILE)
        read_document(card, MAX_CARD_BYTES, "a model card", ModelError)
        said = metadata_load(card) or {}
    except (ModelError, OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {key: said[key] for key in LICENCE_KEYS if isinstance(said.get(key), str)}
