"""The command line. Heavy imports wait until a command needs them: help, validate, schema and plan
import neither torch nor ray.
"""

import argparse
import faulthandler
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import rayprune
from rayprune.orchestrator.commands import jobs, models, runs
from rayprune.specs.errors import INTERRUPTED, RaypruneError, SpecError, printable
from rayprune.workers.machine.shortage import explained

RESEND_SECONDS = 0.1
MEMORY_ADVICE = "free some, or lower what the job asks for"
KEPT = "; finished tasks are kept"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 2 spec, 3 model, 4 resources, 5 verification,
    130 interrupted.
    """
    _open_standard_streams()
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = "; give each field a --set of its own" if "=" in unknown[0] else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _interrupt)
        sys.unraisablehook = _unraisable
    with suppress(OSError, ValueError):  # where the stream is no file
        faulthandler.enable()  # a mapped file that is cut off ends the process: say where
    try:
        code: int = options.command(options) or 0
        sys.stdout.flush()
        return code
    except BaseException as error:  # the process boundary
        if options.ends_with_its_reader and _reader_is_gone(error):
            return 0
        return _exit_code(error, options.keeps_tasks and options.out is not None)


def _exit_code(error: BaseException, keeps_tasks: bool) -> int:
    """Tell what has ended a command, by what lies behind it, and whether the same command would go
    on; the exit code.
    """
    kept = KEPT if keeps_tasks else ""
    if isinstance(error, SystemExit):
        raise error
    found = explained(error, "", MEMORY_ADVICE + kept)
    if isinstance(found, KeyboardInterrupt):
        again = "; run the same command again to go on" if keeps_tasks else ""
        return _told(f"interrupted{again}", INTERRUPTED)
    if isinstance(found, RaypruneError):
        return _told(str(found), found.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        place = printable(os.fsdecode(error.filename))
        return _told(f"{place}: {error.strerror}{kept}", SpecError.exit_code)
    with suppress(OSError):
        traceback.print_exception(error)  # a bug, shown in full
    return 1


def _told(words: str, code: int) -> int:
    """Say why a command ends, to whoever still listens; the exit code."""
    with suppress(OSError):
        print(f"rayprune: {words}", file=sys.stderr, flush=True)
    return code


def _open_standard_streams() -> None:
    """Let a stream that the caller has closed lead nowhere: else the next file that is opened would
    get its number, and what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _reader_is_gone(error: BaseException) -> bool:
    """Whether whoever read the output has stopped, as `head` does: then there is no more to do."""
    from rayprune.workers.machine.output import write_nowhere

    if not isinstance(error, BrokenPipeError):
        return False
    asked = select.poll()
    try:  # what failed may have left nothing to write, so no other write would tell
        asked.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # no file: a notebook's, or a test's
        return False
    if not any(found & select.POLLERR for _, found in asked.poll(0)):
        return False
    write_nowhere()
    return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _unraisable(ignored: "sys.UnraisableHookArgs") -> None:
    """An interrupt that struck inside a finalizer is lost to the command: Python drops what these
    raise. Interrupt it again.
    """
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(ignored)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayprune", description="Prune large language models, layer by layer, on Ray."
    )
    parser.add_argument("--version", action="version", version=f"rayprune {rayprune.__version__}")
    parser.set_defaults(ends_with_its_reader=True, keeps_tasks=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for about in (jobs, runs, models):
        about.add(commands)
    completion = commands.add_parser("completion", help="print what completes words in a shell")
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])
    completion.set_defaults(command=lambda options: print(_completion(parser, options.shell)))
    for listed in commands._choices_actions:
        command, told = commands.choices[listed.dest], listed.help or ""
        command.description, command.formatter_class = f"{told[:1].upper()}{told[1:]}.", _Help
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default in (False, [], argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


def _completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script for a shell that completes commands, options and, where there is a path, files."""
    import shtab

    for action in _actions(parser):
        if action.type is Path:
            setattr(action, "complete", shtab.FILE)  # noqa: B010, argparse does not know it
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options and arguments of a parser and of those inside it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inside in action.choices.values():
                yield from _actions(inside)


if __name__ == "__main__":
    sys.exit(main())
