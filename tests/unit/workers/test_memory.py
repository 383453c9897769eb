"""Freed memory: what stays with the process, and what the system gets back."""

import resource
import subprocess
import sys

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


BLOCKS = """
import resource
from rayprune.workers.machine.memory import large_blocks_kept

def faults():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(128 << 20)
        block[:: resource.getpagesize()] = block[:: resource.getpagesize()]
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with large_blocks_kept():
    kept = faults()
print(kept, faults())
"""
"""Page faults while 128 MiB are taken, written and freed for the second time: kept, and not."""


@pytest.mark.skipif(memory._set is None, reason="a libc without mallopt")
def test_large_blocks_stay_for_the_next_ones_of_their_size() -> None:
    pages = 128 * MIB // resource.getpagesize()
    command = [sys.executable, "-c", BLOCKS]  # the heap of a process that is new
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    kept, mapped = map(int, found)
    assert kept < pages / 10 < pages <= mapped
