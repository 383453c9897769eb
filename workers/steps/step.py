"""What a step is, and what steps keep between calls."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar
from weakref import WeakMethod

P = ParamSpec("P")
T = TypeVar("T")
Receipt = dict[str, Any]
"""Small JSON for the driver."""
Step = Callable[P, tuple[Receipt, T]]
"""Returns a receipt, and a payload (arrays or None) that goes from worker to worker."""


def step(method: Step[P, T]) -> Step[P, T]:
    """Mark a method as a step that the driver may ask for."""
    vars(method)["is_step"] = True
    return method


def steps_of(room: type) -> dict[str, Step[..., Any]]:
    """The methods of a class that are steps, by name."""
    return {name: each for name, each in vars(room).items() if getattr(each, "is_step", False)}


class Droppable(Protocol):
    """Something that keeps what can be made again."""

    def drop(self) -> None:
        """Forget what is kept."""


def drop_all(kept: Iterable[Droppable]) -> None:
    """Let earlier steps forget what they keep: their part of the work is through."""
    for each in kept:
        each.drop()


class Cached(Generic[T]):
    """A value that a method of its owner makes when it is first asked for, and again after `drop`.

    It does not hold its owner: both are gone as soon as nobody else holds that, and with them the
    tensors, without waiting for the garbage collector.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = WeakMethod(make)
        self._made: list[T] = []

    @property
    def value(self) -> T:
        """The value."""
        if not self._made:
            make = self._make()
            assert make is not None, "the owner is gone"
            self._made.append(make())
        return self._made[0]

    def drop(self) -> None:
        """Forget it."""
        self._made.clear()
