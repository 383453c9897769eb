"""A folder as transformers itself reads it; no code that lies in it is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from rayprune.specs.errors import ModelError, RaypruneError
from rayprune.workers.machine.shortage import is_out_of_memory

MOST_WORDS = 400
"""Characters that are shown of a foreign library's error."""


def stock_config(model: Path) -> Any:
    """The config as its class in transformers reads it.

    Raises:
        ModelError: the class refuses it.
    """
    file = model / "config.json"
    with refused_by("transformers", file, "correct the value"):
        return AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)


def stock_ends(model: Path) -> set[int]:
    """Tokens that end a text, by the folder's file of how the model writes, or by its config.

    Raises:
        ModelError: that file or the config is damaged.
    """
    file = model / "generation_config.json"
    if file.exists():
        with refused_by("transformers", file, "fetch it again, or remove it"):
            found = GenerationConfig.from_pretrained(model, local_files_only=True)
    else:
        found = GenerationConfig.from_model_config(stock_config(model))
    ends: Any = found.eos_token_id
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


@contextmanager
def refused_by(library: str, file: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged or odd file into an error that names it.

    Raises:
        ModelError: instead.
    """
    try:
        yield
    except (RaypruneError, MemoryError):
        raise
    # a wrong value is met with KeyError, TypeError, AssertionError, even plain Exception
    except Exception as error:
        if is_out_of_memory(error):
            raise
        words = " ".join(str(error).split()) or "no reason given"
        raise ModelError(
            f"{file}: {library} refuses it: {type(error).__name__}: {words[:MOST_WORDS]}; {remedy}"
        ) from error
