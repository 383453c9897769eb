"""The files of a text: what may be opened, in which order, and the bytes in a compressed one.

No torch. Pipes, devices and broken links are refused before anything opens them.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rayprune.specs.errors import SpecError
from rayprune.specs.files import no_file

HEAD = 2**16
"""Bytes of a file, after decompression, by which its form is recognised."""
MOST_LINE = 2**26
"""Characters of the longest line that is read."""
ARROW_STATE, ARROW_SPLITS = "state.json", "dataset_dict.json"
"""What `datasets` writes beside the Arrow files of a dataset, and above those of its splits."""
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_MARKS = {  # the marks of UTF-32 begin with those of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BESIDE = ("readme", "license", "licence", "notice", "citation", "dataset_info", "sha256sums")
"""Beginnings of the names of files that lie beside texts and are none themselves."""
_BESIDE_ENDINGS = (".md5", ".sha256", ".lock")


@dataclass(frozen=True)
class TextFile:
    """One file of a text, as it is read."""

    path: Path
    compression: str | None
    head: bytes
    """The first `HEAD` bytes after decompression."""

    @property
    def encoding(self) -> str:
        """What its byte order mark says; UTF-8 without one."""
        return next((name for mark, name in _MARKS.items() if self.head.startswith(mark)), "utf-8")

    @property
    def is_whole(self) -> bool:
        """Whether the head is all of it."""
        return len(self.head) < HEAD

    def head_text(self) -> str:
        """The head as text; what cannot be decoded is left out."""
        return self.head.decode(self.encoding, errors="ignore")

    def open(self) -> IO[bytes]:
        """Its bytes, decompressed."""
        return _opened(self.path, self.compression)

    def open_text(self, newline: str | None = None) -> io.TextIOWrapper:
        """Its text; line ends become `\\n` unless `newline` says otherwise."""
        return io.TextIOWrapper(self.open(), encoding=self.encoding, newline=newline)


def text_files(path: Path) -> list[Path]:
    """The files of a text in the order in which they are read: the file itself, those of a folder
    by name, or those of a dataset that `datasets` has saved.

    Raises:
        SpecError: there is no such file, it is none that can be read, or the folder holds no text.
    """
    mode = _mode(path)
    if not stat.S_ISDIR(mode):
        return [path]
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise unreadable(path, error) from None
    if (path / ARROW_SPLITS).exists():
        raise SpecError(
            f"{path}: a dataset of several splits; name one of them: {_folders(inside)}"
        )
    if (path / ARROW_STATE).exists():
        return _arrow_files(path)
    found = [item for item in inside if not item.name.startswith((".", "_"))]
    if any(item.is_dir() for item in found):
        raise SpecError(
            f"{path}: holds folders ({_folders(found)}); name one of them, or a folder that holds"
            " files alone"
        )
    texts = [item for item in found if not _lies_beside(item)]
    if not texts:
        raise SpecError(f"{path}: cannot be read: a directory without a text; name a file")
    for item in texts:
        _mode(item)
    return texts


def inspect(path: Path) -> TextFile:
    """A file with its compression and its first bytes.

    Raises:
        SpecError: it cannot be read, is damaged, or is compressed twice.
    """
    _mode(path)
    with explained(path):
        with path.open("rb") as handle:
            compression = _compression(handle.read(16))
        with _opened(path, compression) as handle:
            head = _read_up_to(handle, HEAD)
    if compression and _compression(head[:16]):
        raise SpecError(f"{path}: is compressed twice; decompress it once")
    return TextFile(path, compression, head)


def bounded_lines(handle: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """A file's lines.

    Raises:
        SpecError: one is longer than `MOST_LINE` characters.
    """
    number = 0
    while line := handle.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise SpecError(
                f"{path}:{number}: a line of more than {MOST_LINE:,} characters; give every"
                " document a line of its own"
            )
        yield line


@contextmanager
def explained(path: Path, file: TextFile | None = None) -> Iterator[None]:
    """Turn what reading a file can raise into an error that names it.

    Raises:
        SpecError: instead.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        where = f", at byte {_bad_byte(file)}" if file else ""
        raise SpecError(
            f"{path}: not {error.encoding.upper()} ({error.reason}{where}); convert it to UTF-8"
            " first, for instance with iconv"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise SpecError(f"{path}: damaged ({error}); fetch or compress it again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> SpecError:
    """The error of a file that the machine does not give, or whose compression is damaged."""
    if error.strerror is None:
        return SpecError(f"{path}: damaged ({error}); fetch or compress it again")
    return SpecError(f"{path}: cannot be read: {error.strerror}")


def _mode(path: Path) -> int:
    """What a path is, links followed.

    Raises:
        SpecError: it is neither a file nor a folder.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if os.path.islink(path):
            raise SpecError(
                f"{path}: cannot be read: links to {os.readlink(path)}: {error.strerror}"
            ) from None
        raise unreadable(path, error) from None
    if kind := no_file(mode):
        raise SpecError(f"{path}: cannot be read: {kind}; write the text to a file first")
    return mode


def _folders(inside: list[Path]) -> str:
    return ", ".join(item.name for item in inside if item.is_dir())


def _lies_beside(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(_BESIDE) or name.endswith(_BESIDE_ENDINGS)


def _arrow_files(path: Path) -> list[Path]:
    """The Arrow files of a saved dataset, in its own order."""
    try:
        state: Any = json.loads((path / ARROW_STATE).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        picked = bool(state.get("_indices_files") or state.get("_indices_data_files"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SpecError(f"{path / ARROW_STATE}: no state of a saved dataset ({error})") from None
    if picked:
        raise SpecError(
            f"{path}: keeps its rows' order in files of its own; save it again after"
            " flatten_indices()"
        )
    for name in names:
        if Path(name).name != name:
            raise SpecError(f"{path / ARROW_STATE}: points to {name!r}, outside the folder")
        _mode(path / name)
    if not names:
        raise SpecError(f"{path}: a dataset without rows")
    return [path / name for name in names]


def _compression(head: bytes) -> str | None:
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bz2"
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def _opened(path: Path, compression: str | None) -> IO[bytes]:
    match compression:
        case None:
            return path.open("rb")
        case "gzip":
            return cast(IO[bytes], gzip.open(path))
        case "bz2":
            return cast(IO[bytes], bz2.open(path))
        case "xz":
            return cast(IO[bytes], lzma.open(path))
    import pyarrow as pa  # takes a moment, and most texts do not need it

    return cast(IO[bytes], pa.CompressedInputStream(pa.OSFile(str(path)), compression))


def _read_up_to(handle: IO[bytes], size: int) -> bytes:
    parts, missing = [], size
    while missing and (part := handle.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _bad_byte(file: TextFile) -> int:
    """Where a file stops being text, in bytes after decompression."""
    encoding = file.encoding.removesuffix("-sig")
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    with file.open() as handle:
        while True:
            chunk = handle.read(2**20)
            done += len(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done - len(error.object) + error.start
            if not chunk:
                return done
