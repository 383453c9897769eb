"""The methods that rank the units of a layer: one file each, found by being here.

The file `<name>.py` holds one class of options with `name: Literal["<name>"] = "<name>"`; every
other option has a default. `rayprune/workers/numerics/methods/<name>.py` ranks.
"""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from rayprune.specs.methods.options import MethodOptions


def _found() -> Iterator[tuple[str, type[MethodOptions]]]:
    for name in sorted(module.name for module in iter_modules(__path__)):
        module = import_module(f"{__name__}.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                if not issubclass(value, MethodOptions):
                    continue
                yield value.model_fields["name"].default, value


RANKINGS: dict[str, type[MethodOptions]] = dict(_found())
"""The options of every method that ranks units, by its name."""
