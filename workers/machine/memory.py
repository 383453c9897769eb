"""How much memory a process takes for itself. No torch at import.

Private memory is what the kernel cannot take back without swapping: anonymous pages. Mapped files
(weights, spilled states) are not part of it.
"""

import ctypes
import resource
import threading
import weakref
from pathlib import Path
from typing import Self

SAMPLE_SECONDS = 0.02
_STATUS = Path("/proc/self/status")
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


def private_bytes() -> int:
    """Anonymous resident memory of this process, in bytes; where the system does not tell, its peak
    resident memory.
    """
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def give_back_free_memory() -> None:
    """Give free pages of the heap back to the system: beside long-lived tensors glibc's heap keeps
    holes of hundreds of MiB.
    """
    if _trim is not None:
        _trim(0)


def _watch(meter: "weakref.ref[PeakMemory]", done: threading.Event) -> None:
    while not done.wait(SAMPLE_SECONDS):
        if found := meter():
            found._note()
        del found


class PeakMemory:
    """The highest private memory since the start, sampled by a thread of its own, which ends with
    the object.
    """

    def __init__(self) -> None:
        self._peak, self._done = private_bytes(), threading.Event()
        threading.Thread(
            target=_watch, args=(weakref.ref(self), self._done), daemon=True, name="peak-memory"
        ).start()
        weakref.finalize(self, self._done.set)

    def _note(self) -> None:
        self._peak = max(self._peak, private_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._note()
        self._done.set()

    @property
    def bytes(self) -> int:
        """The peak so far, in bytes; after a `with` block, that of the block."""
        if not self._done.is_set():
            self._note()
        return self._peak
