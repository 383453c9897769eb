"""What a worker does its steps with."""

from collections import Counter
from weakref import ref

from rayprune.workers.steps.step import Cached, drop_all, steps_of
from rayprune.workers.worker import ROOMS, STEPS


class Owner:
    """Makes values, and counts them."""

    def __init__(self) -> None:
        self.made = 0
        self.nothing, self.number = Cached(self.make_nothing), Cached(self.make_number)

    def make_nothing(self) -> None:
        self.made += 1

    def make_number(self) -> int:
        return 7


def test_a_cached_value_is_made_once_and_again_when_it_was_dropped() -> None:
    owner = Owner()
    assert (owner.nothing.value, owner.nothing.value) == (None, None)
    assert owner.made == 1, "made once, even where it is None"
    drop_all([owner.nothing, owner.number])
    assert (owner.nothing.value, owner.number.value) == (None, 7)
    assert owner.made == 2


def test_a_cached_value_does_not_hold_its_owner() -> None:
    owner = Owner()
    assert owner.number.value == 7
    gone = ref(owner)
    del owner
    assert gone() is None


def test_every_step_is_in_one_class() -> None:
    names = Counter(name for room in ROOMS for name in steps_of(room))
    assert set(names.values()) == {1}
    assert names.keys() == STEPS.keys() >= {"collect", "decide", "flow", "write_layer"}
