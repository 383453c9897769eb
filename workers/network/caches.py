"""The cache of keys and values, under the names that this version of transformers has for it."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


def with_cache(network: Any, known: Any) -> dict[str, Any]:
    """The argument by which a network is given its cache."""
    return {"cache" if _says_cache(type(network).forward) else "past_key_values": known}


def cache_of(output: Any) -> Any:
    """The cache behind a pass."""
    return output.cache if "cache" in output else output.past_key_values


@cache
def _says_cache(forward: Callable[..., Any]) -> bool:
    return "cache" in inspect.signature(forward).parameters
