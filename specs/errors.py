"""The errors a user can meet. Each says what, where and what to do, and carries the exit code of
the command line.
"""

from typing import ClassVar

INTERRUPTED = 130
"""The exit code of a command that the user, or the machine, has stopped."""


def printable(line: str) -> str:
    """A line without what a terminal would obey instead of showing: names come from files."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )


def one_line(error: BaseException) -> str:
    """What an exception says, on one line, without a traceback that stands in it."""
    text = str(error).partition("Traceback (most recent call last)")[0]
    return (
        "; ".join(line.strip(" ;") for line in text.splitlines() if line.strip(" ;."))
        or type(error).__name__
    )


class RaypruneError(Exception):
    """Base of every error that is reported to the user without a traceback."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return "\n".join(printable(line) for line in super().__str__().splitlines())


class LostPeerError(Exception):
    """A worker has not reached another one: a failure of the machinery, which the driver decides
    about.
    """


class SpecError(RaypruneError):
    """The job file, an override, an input text or the run folder does not fit the job."""

    exit_code = 2


class ModelError(RaypruneError):
    """The model folder is missing, damaged, unsupported, or holds non-finite weights."""

    exit_code = 3


class ResourceError(RaypruneError):
    """The job needs more workers, memory or time than there is."""

    exit_code = 4


class VerificationError(RaypruneError):
    """A written file differs from its record, or the exported model does not load as planned."""

    exit_code = 5
