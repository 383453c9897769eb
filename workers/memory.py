"""How much memory a process takes for itself. No torch at import.

Private memory is what the kernel cannot take back without swapping: anonymous pages. Mapped files (weights, spilled
states) are not part of it.
"""

import resource
import threading
import time
from pathlib import Path

SAMPLE_SECONDS = 0.02
_STATUS = Path("/proc/self/status")


def private_bytes() -> int:
    """Anonymous resident memory of this process, in bytes; where the system does not tell, its peak resident memory."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """The highest private memory since the start, sampled by a thread of its own."""

    def __init__(self) -> None:
        self._peak = private_bytes()
        threading.Thread(target=self._watch, daemon=True, name="peak-memory").start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, private_bytes())
            time.sleep(SAMPLE_SECONDS)

    @property
    def bytes(self) -> int:
        """The peak so far, in bytes."""
        self._peak = max(self._peak, private_bytes())
        return self._peak
