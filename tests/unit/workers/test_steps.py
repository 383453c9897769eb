"""What a worker does its steps with."""

from collections import Counter

from rayprune.workers.steps.step import Cached, drop_all, steps_of
from rayprune.workers.worker import ROOMS, STEPS


def test_a_cached_value_is_made_once_and_again_when_it_was_dropped() -> None:
    made: list[int] = []
    first, other = Cached(lambda: made.append(0)), Cached(lambda: 7)
    assert (first.value, first.value) == (None, None)
    assert len(made) == 1, "made once, even where it is None"
    drop_all([first, other])
    assert (first.value, other.value) == (None, 7)
    assert len(made) == 2


def test_every_step_is_in_one_class() -> None:
    names = Counter(name for room in ROOMS for name in steps_of(room))
    assert set(names.values()) == {1}
    assert names.keys() == STEPS.keys() >= {"collect", "decide", "flow", "write_layer"}
