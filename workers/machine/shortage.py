"""What a machine refuses: memory, disk, processes. It shows in exceptions of many classes, some
inside others; here they become the errors that a user sees. No torch.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayprune.specs.errors import RaypruneError, ResourceError

_NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
"""What torch and its libraries say of memory they did not get, in exceptions without a class of
their own.
"""
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
"""What the system says of a full disk, a quota and a limit on files, as others repeat it."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXHAUSTED = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it: what it was raised from or during, the members of a group,
    and what torch's `CheckpointException` (a BaseException) has met on the ranks.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        failures: Any = getattr(found, "failures", None)
        inside = [pair[0] for pair in failures.values()] if isinstance(failures, dict) else []
        inside += getattr(found, "exceptions", ())
        context = None if found.__suppress_context__ else found.__context__
        waiting += [
            cause
            for cause in (*inside, found.__cause__, context)
            if isinstance(cause, BaseException)
        ]


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return not isinstance(error, RaypruneError) and any(word in str(error) for word in words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory: of Python, numpy, the system or torch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, Exception) and _says(error, _NO_MEMORY)
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a file cannot grow: a full disk, a quota, a limit on sizes."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, Exception) and _says(error, _NO_ROOM)


def _is_exhausted(error: BaseException) -> bool:
    """Whether the machine or the account has no more processes, threads or open files to give."""
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return isinstance(error, RuntimeError) and _says(error, ("can't start new thread",))


def explained(error: BaseException, what: str, advice: str) -> BaseException | None:
    """What an exception comes down to: an interrupt, an error of ours, or a shortage as one; None
    where it is something else. `advice` is for a shortage of memory.

    An error of ours counts by itself or on a rank; a bug while one is handled stays a bug.
    """
    causes, place = [*causes_of(error)], f"{what}: " if what else ""
    for cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            return cause
    for cause in causes:
        detail = (str(cause).splitlines() or [type(cause).__name__])[0]
        if isinstance(cause, RaypruneError) and (
            cause is error or not isinstance(error, Exception)
        ):
            return cause
        if is_disk_full(cause):
            return ResourceError(
                f"{place}{detail}; finished tasks are kept: make room, or raise the limit on files,"
                " and run the same command again"
            )
        if is_out_of_memory(cause):
            return ResourceError(f"{place}out of memory ({detail}): {advice}")
        if _is_exhausted(cause):
            return ResourceError(
                f"{place}{detail}: a limit on processes, threads or open files is reached; raise"
                " it (`ulimit -a` shows it), or lower parallel.workers"
            )
    return None


@contextmanager
def explained_shortage(what: str, advice: str) -> Iterator[None]:
    """Say of what memory or disk has run out, and what to do.

    Raises:
        ResourceError: in place of whatever exception says so; others pass.
        KeyboardInterrupt: in place of one that it is hidden in.
    """
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as error:
        found = explained(error, what, advice)
        if found is None or found is error:
            raise
        raise found from None
