"""Commands of ours in processes that are forked from one that has imported everything: an attempt
takes as long as its work, and may die, be killed, or find the machine broken.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
Fault = Callable[[], None]
"""Breaks something in the process that calls it, before the command begins; can be pickled."""
TIMED_OUT = -999
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal's number where one ended it), what it
    printed, and the seconds it took.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def words(self) -> str:
        return self.out + self.err


def attempt(
    arguments: Sequence[str],
    *faults: Fault,
    timeout: float = 60,
    kill_after: float | None = None,
    folder: Path | None = None,
) -> Ended:
    """Run a command in a process of its own, after the faults; `kill_after` so many seconds it is
    killed.
    """
    _find_ourselves()
    with tempfile.TemporaryDirectory() as scratch:
        process = _context.Process(target=_child, args=(arguments, faults, scratch, folder))
        begin = time.perf_counter()
        process.start()
        process.join(timeout if kill_after is None else kill_after)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        seconds, code = time.perf_counter() - begin, process.exitcode
        if late:  # the server of forks may lose the status of what is killed: it says 255 then
            code = TIMED_OUT if kill_after is None else -signal.SIGKILL
        out, err = (
            file.read_text(errors="replace") if (file := Path(scratch, name)).exists() else ""
            for name in ("out", "err")
        )
    assert code is not None
    return Ended(code, out, err, seconds)


def _find_ourselves() -> None:
    """The server of forks is started by Python alone, which does not know where pytest looks."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])


def _child(
    arguments: Sequence[str], faults: Sequence[Fault], scratch: str, folder: Path | None
) -> None:
    from rayprune.orchestrator.cli import main

    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(Path(scratch, name), os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(handle, number)
    if folder:
        os.chdir(folder)
    try:
        for fault in faults:
            fault()
        code = main(arguments)
    except SystemExit as end:  # argparse's way
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
