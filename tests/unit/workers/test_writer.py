"""Work in order in a thread beside."""

import threading

import pytest

from rayprune.workers.store.writer import Writer


def test_one_after_the_other_and_beside_the_caller() -> None:
    writer, may_end, done = Writer(), threading.Event(), list[int]()
    writer.put(lambda: (may_end.wait(10), done.append(1)))
    assert not done
    may_end.set()
    for number in (2, 3):
        writer.put(lambda number=number: done.append(number))
    writer.wait()
    assert done == [1, 2, 3]


def test_an_error_is_told_once_and_nothing_is_done_behind_it() -> None:
    writer, done = Writer(), list[int]()

    def fail() -> None:
        raise OSError("no space")

    writer.put(fail)
    with pytest.raises(OSError, match="no space"):
        writer.put(lambda: done.append(1))
    writer.wait()
    assert not done
    writer.put(lambda: done.append(2))
    writer.wait()
    assert done == [2]
