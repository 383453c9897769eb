"""What goes wrong in a forked process: it dies at the n-th operation on files, finds the disk full,
or is interrupted. Operations are told apart by Python's audit events, wherever in the code they
are.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_BY_NAME = {
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.link": "link",
    "os.truncate": "truncate",
}
TORN = b'{"time": 1.0, "event": "step-fin'
"""What a process that died while it appended has left of a line."""


@dataclass(frozen=True)
class Operation:
    """One operation on a file or folder; its path is relative to the folder that is watched."""

    name: str
    path: str

    @property
    def where(self) -> str:
        """Its path without what differs by layer, shard, step or chance."""
        path = re.sub(r"\.([^/]+?)\.[0-9a-f]{32}\.tmp", r"\1", self.path)
        path = re.sub(r"(?<![0-9a-zA-Z])[0-9a-f]{8,64}(?![0-9a-zA-Z])", "*", path)
        path = re.sub(r"/[0-9a-f]{2}/\*", "/*", path)
        path = re.sub(r"^store/[0-9a-f]{2}$", "store/*", path)
        return re.sub(r"\d{4,}", "N", path)


def _absolute(path: object, folder: object = None) -> str:
    if isinstance(path, int):
        return ""
    text = os.fsdecode(path)  # type: ignore[arg-type]
    if not text.startswith("/") and isinstance(folder, int) and folder >= 0:
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    return os.path.abspath(text)


def _operation(event: str, args: Sequence[object]) -> tuple[str, str] | None:
    """An audit event as an operation that changes something, and the path that it is about."""
    if event == "open" and args[0] is not None:
        path, mode, flags = args
        if isinstance(flags, int) and flags & _WRITING:
            appends = flags & os.O_APPEND or (isinstance(mode, str) and "a" in mode)
            return "append" if appends else "write", _absolute(path)
        return ("sync", name) if (name := _absolute(path)).endswith(".tmp") else None
    if event == "os.rename":
        return "rename", _absolute(args[1], args[3])
    if event == "os.link":
        return "link", _absolute(args[1], args[3])
    if event in _BY_NAME:
        return _BY_NAME[event], _absolute(args[0], args[-1])
    return None


class Watch:
    """Calls `act` with every operation inside some folders, before it happens."""

    def __init__(self, root: Path, act: "Act") -> None:
        self._root, self._act = str(root.absolute()), act
        self._turn, self._busy = threading.Lock(), threading.local()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Sequence[object]) -> None:
        if vars(self._busy) or not (event == "open" or event.startswith("os.")):
            return
        self._busy.here = True
        try:
            found = _operation(event, args)
            if found and found[1].startswith(self._root):
                source = _absolute(args[0], args[2]) if event == "os.rename" else found[1]
                with self._turn:  # threads wait for one another
                    self._act.meet(Operation(found[0], self._name(found[1])), Path(source))
        finally:
            del self._busy.here

    def _name(self, path: str) -> str:
        """Relative to the root; `store/...` in the store beside it."""
        if path == self._root:
            return "."
        beside, _, name = path.removeprefix(self._root).partition("/")
        return f"{beside.lstrip('-')}/{name}" if beside else name


class Act:
    """What is done at an operation."""

    def meet(self, operation: Operation, path: Path) -> None:
        raise NotImplementedError


@dataclass
class Count(Act):
    """Writes every operation below `root` into a file, one JSON array a line."""

    root: Path
    file: Path

    def __call__(self) -> None:
        self._handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        Watch(self.root, self)

    def meet(self, operation: Operation, path: Path) -> None:
        line = json.dumps([operation.name, operation.path]) + "\n"
        os.write(self._handle, line.encode())


def counted(file: Path) -> list[Operation]:
    """The operations that were counted."""
    return [Operation(*json.loads(line)) for line in file.read_text().splitlines()]


@dataclass
class _At(Act):
    """Does something at the n-th operation below `root`, and at all that follow it."""

    root: Path
    number: int

    def __call__(self) -> None:
        self._left = self.number
        Watch(self.root, self)

    def meet(self, operation: Operation, path: Path) -> None:
        self._left -= 1
        if self._left < 0:
            self.reached(operation, path)

    def reached(self, operation: Operation, path: Path) -> None:
        raise NotImplementedError


@dataclass
class DieAt(_At):
    """Kills its process before the n-th operation below `root`, or, `torn`, when half of what is
    about to be appended or renamed has reached the disk.
    """

    torn: bool = False

    def reached(self, operation: Operation, path: Path) -> None:
        if self.torn:
            tear(operation, path)
        os.kill(os.getpid(), signal.SIGKILL)


def tear(operation: Operation, path: Path) -> None:
    """Leave half of what is about to be appended or renamed."""
    if operation.name == "append":
        with path.open("ab") as handle:
            handle.write(TORN)
    elif path.is_file() and path.stat().st_nlink == 1:  # else it was never written
        os.truncate(path, path.stat().st_size // 2)


@dataclass
class KeepAt(Act):
    """Copies `root`, and the store beside it, as a process would leave them that died at an
    operation, for every place in `places`: its number, and whether it is torn. A copy has the name
    that `kept` says.
    """

    root: Path
    places: Collection[tuple[int, bool]]

    def __call__(self) -> None:
        self._number = 0
        Watch(self.root, self)

    def meet(self, operation: Operation, path: Path) -> None:
        for torn in (False, True):
            if (self._number, torn) in self.places:
                self._keep(kept(self.root, self._number, torn), operation, path, torn)
        self._number += 1

    def _keep(self, copy: Path, operation: Operation, path: Path, torn: bool) -> None:
        ours = (folder for folder in self.root.parent.glob(f"{self.root.name}*") if folder.is_dir())
        for folder in ours:
            beside = folder.name.removeprefix(self.root.name)
            target = copy / f"{self.root.name}{beside}"
            shutil.copytree(folder, target, symlinks=True)
            if torn and path.is_relative_to(folder):
                tear(operation, target / path.relative_to(folder))


def kept(root: Path, number: int, torn: bool) -> Path:
    """Where `KeepAt` copies what is there at an operation."""
    return root.parent / "kept" / f"{number}{'-torn' if torn else ''}"


@dataclass
class FailAt(_At):
    """The n-th operation below `root`, and all that follow it, find no room on the disk."""

    error: int = errno.ENOSPC

    def reached(self, operation: Operation, path: Path) -> None:
        if operation.name not in ("remove", "rmdir"):  # these need no room
            raise OSError(self.error, os.strerror(self.error), str(path))


@dataclass
class InterruptAt(_At):
    """A signal reaches the process at the n-th operation below `root`."""

    signal: int = signal.SIGTERM

    def reached(self, operation: Operation, path: Path) -> None:
        if self._left == -1:
            os.kill(os.getpid(), self.signal)


@dataclass
class FileLimit:
    """No file may grow beyond so many bytes, as with `ulimit -f`."""

    limit: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@dataclass
class MemoryLimit:
    """The process may have so many bytes of address space more than it has."""

    limit: int

    def __call__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + self.limit
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


@dataclass
class ClockJump:
    """The clock is so many seconds off, one way and then the other."""

    seconds: float

    def __call__(self) -> None:
        import time

        told, calls = time.time, iter(_alternate(self.seconds))
        time.time = lambda: told() + next(calls)


def _alternate(value: float) -> Iterator[float]:
    while True:
        yield value
        yield -value


@dataclass
class Without:
    """A package is not installed."""

    package: str

    def __call__(self) -> None:
        for name in [name for name in sys.modules if self.hides(name)]:
            del sys.modules[name]
        sys.meta_path[:] = [_Hiding(finder, self) for finder in sys.meta_path]

    def hides(self, name: str) -> bool:
        return f"{name}.".startswith(f"{self.package}.")


class _Hiding:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, without: Without) -> None:
        self._finder, self._without = finder, without

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if self._without.hides(name) else self._finder.find_spec(name, path, target)


@dataclass
class NoRoom:
    """The disk has so many bytes left."""

    free: int

    def __call__(self) -> None:
        told = shutil.disk_usage
        shutil.disk_usage = lambda path: told(path)._replace(free=self.free)


@dataclass
class OneLayerAtATime:
    """The plan has room for one layer a worker on the dense path."""

    def __call__(self) -> None:
        from dataclasses import replace

        from rayprune.orchestrator import run  # and with it every module that plans
        from rayprune.orchestrator.planning import steps

        del run
        planned = steps.make_plan

        def plan(*arguments: object, **options: object) -> object:
            made = planned(*arguments, **options)  # type: ignore[arg-type]
            return replace(made, memory=replace(made.memory, layers_per_chunk=1))

        ours = [module for name, module in sys.modules.items() if name.startswith("rayprune.")]
        for module in ours:  # wherever it was imported by its name
            if getattr(module, "make_plan", None) is planned:
                module.make_plan = plan  # type: ignore[attr-defined]


RAY_WAS_STARTED = 77


@dataclass
class NoRay:
    """Ray is not to be started: the process ends where it tries."""

    def __call__(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Sequence[object]) -> None:
        if event == "subprocess.Popen" and "ray" in str(args[1]):
            os._exit(RAY_WAS_STARTED)


@dataclass
class Umask:
    """Files are made with these bits missing."""

    mask: int

    def __call__(self) -> None:
        os.umask(self.mask)


@dataclass
class ActAt(_At):
    """Somebody does something to another file at the n-th operation below `root`."""

    act: Callable[[Path], None]
    target: Path

    def reached(self, operation: Operation, path: Path) -> None:
        if self._left == -1:
            self.act(self.target)


@dataclass
class Strays:
    """Notes in a file what is changed outside some folders, one path a line."""

    allowed: tuple[Path, ...]
    file: Path

    def __call__(self) -> None:
        self._handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._allowed = tuple(map(str, self.allowed))
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Sequence[object]) -> None:
        if event == "open" or event.startswith("os."):
            found = _operation(event, args)
            if found and found[0] != "sync" and not found[1].startswith(self._allowed):
                os.write(self._handle, (found[1] + "\n").encode())
