"""Files that are written while the next work is done. No torch."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """One thread that does what it is given, in order: nothing begins before all that was given
    earlier has succeeded.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._last: Future[object] | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Have something done, once the last has ended.

        Raises:
            Exception: the last has failed; this is not done.
        """
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for the last.

        Raises:
            Exception: it has failed, which is told once.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()
