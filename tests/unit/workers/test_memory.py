"""Freed memory: what stays with the process, and what the system gets back."""

import pytest

from rayprune.workers.machine import memory
from rayprune.workers.machine.memory import give_back_free_memory, private_bytes

MIB = 2**20


@pytest.mark.skipif(memory._info is None, reason="a libc without mallinfo2")
def test_free_memory_is_given_back_where_it_is_more_than_may_stay() -> None:
    small = [bytearray(60_000) for _ in range(2_000)]  # of the heap, not mapped one by one
    del small[:-1]
    held = private_bytes()
    give_back_free_memory(above=1024 * MIB)
    assert private_bytes() > held - 8 * MIB
    give_back_free_memory(above=64 * MIB)
    assert private_bytes() < held - 64 * MIB
    assert len(small) == 1
