"""How much memory a process takes for itself. No torch at import.

Private memory is what the kernel cannot take back without swapping: anonymous pages. Mapped files
(weights, spilled states) are not part of it.
"""

import ctypes
import os
import resource
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

SAMPLE_SECONDS = 0.02
_STATUS = Path("/proc/self/status")
_libc = ctypes.CDLL(None)
_trim = getattr(_libc, "malloc_trim", None)  # glibc only
_info = getattr(_libc, "mallinfo2", None)  # since glibc 2.33
_set = getattr(_libc, "mallopt", None) if _trim else None


class _HeapInfo(ctypes.Structure):
    """What mallinfo2 tells, in bytes and numbers of blocks (`malloc.h`)."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    _fields_ = tuple((name, ctypes.c_size_t) for name in (*_names, "fordblks", "keepcost"))


if _info is not None:
    _info.restype = _HeapInfo


def private_bytes() -> int:
    """Anonymous resident memory of this process, in bytes; where the system does not tell, its peak
    resident memory.
    """
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def give_back_free_memory(above: int = 0) -> None:
    """Give free pages of the heap back to the system, if they are more than `above` bytes: beside
    long-lived tensors glibc's heap keeps holes of hundreds of MiB. Each page that is given back is
    zeroed by the system when it is needed again.
    """
    if _trim is not None and (_info is None or _info().fordblks > above):
        _trim(0)


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """While it lasts, freed blocks of up to 1 GiB stay in the heap for the next one of their size;
    else glibc maps every block from 32 MiB on anew, and the system zeroes its pages. For loops that
    take the same blocks again and again: what else they leave behind would hold the heap apart.
    """
    _set_thresholds(1 << 30, (1 << 31) - 1)
    try:
        yield
    finally:
        _set_thresholds(32 << 20, 64 << 20)  # as far as glibc raises them by itself


def _set_thresholds(mapped: int, trimmed: int) -> None:
    """`M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD` of `malloc.h`, in bytes."""
    if _set is not None:
        _set(-3, mapped)
        _set(-1, trimmed)


class _Sampler:
    """The one thread of a process that samples for all meters; it ends when there are none."""

    def __init__(self) -> None:
        self._meters: weakref.WeakSet[PeakMemory] = weakref.WeakSet()
        self._lock, self._runs = threading.Lock(), False

    def add(self, meter: "PeakMemory") -> None:
        """Sample for a meter until it is gone or given to `discard`."""
        with self._lock:
            self._meters.add(meter)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._sample, daemon=True, name="peak-memory").start()

    def discard(self, meter: "PeakMemory") -> None:
        """Sample no longer for a meter."""
        with self._lock:
            self._meters.discard(meter)

    def _sample(self) -> None:
        while self._sampled():  # whose variables would keep a meter
            time.sleep(SAMPLE_SECONDS)

    def _sampled(self) -> bool:
        """Give every meter a sample; whether there is one."""
        with self._lock:
            self._runs = len(self._meters) > 0
            now = private_bytes() if self._runs else 0
            for meter in self._meters:
                meter.note(now)
            return self._runs


_sampler = _Sampler()


def _renew() -> None:
    """A forked process has none of its parent's threads."""
    global _sampler
    _sampler = _Sampler()


os.register_at_fork(after_in_child=_renew)


class PeakMemory:
    """The highest private memory since the start, sampled until the object or its `with` block
    ends.
    """

    def __init__(self) -> None:
        self._peak, self._ended = private_bytes(), False
        _sampler.add(self)

    def note(self, now: int) -> None:
        """Take a sample, in bytes."""
        self._peak = max(self._peak, now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.note(private_bytes())
        self._ended = True
        _sampler.discard(self)

    @property
    def bytes(self) -> int:
        """The peak so far, in bytes; after a `with` block, that of the block."""
        if not self._ended:
            self.note(private_bytes())
        return self._peak
