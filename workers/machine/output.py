"""Standard output, whose reader may go away."""

import os
import sys


def write_nowhere() -> None:
    """Let what is still printed vanish: its reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_on(text: str, end: str = "\n") -> None:
    """Print at once. What is done goes on where nobody reads it any more."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        write_nowhere()
