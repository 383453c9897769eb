"""Which form a file has: by its content, where that is certain, else by its name too. No torch."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rayprune.specs.errors import SpecError
from rayprune.specs.texts import TextFormat
from rayprune.workers.texts.files import HEAD, TextFile

Form = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "npy"]
BINARY: dict[bytes, Form] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
    b"\x93NUMPY": "npy",
}
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive (.npz, .docx, .epub)",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"RIFF": "a sound or a film",
    b"ID3": "a sound",
    b"OggS": "a sound or a film",
    b"fLaC": "a sound",
    b"GGUF": "a model",
    b"\x7fELF": "a program",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"FEA1": "an old Feather file",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_TAR = slice(257, 262)
_BY_NAME: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".npy": "npy",
}
_COMPRESSED_NAMES = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
_MARKUP = re.compile(r"\s*<(\?xml|!doctype|html)\b", re.IGNORECASE)
_NUMBERS = re.compile(r"\s*(\d+[\s,]+){8,}\d*\s*")
_COLUMN = re.compile(r"[^\W\d]([\w.\-/ ]{0,38}\w)?")
_DELIMITERS = ",;\t|"
_LONG_LINE = 2**24
FREE_TEXT = ", or format: text to read it as plain text"


@dataclass(frozen=True)
class Source:
    """A file and the form it is read in."""

    file: TextFile
    form: Form
    delimiter: str = ","
    """Of a table in text."""

    @property
    def described(self) -> str:
        """Its form in words."""
        compression = self.file.compression
        return self.form if compression is None else f"{self.form}, {compression}"


def recognise(file: TextFile, wanted: TextFormat) -> Source:
    """A file in its form: the wanted one, or for `auto` the one it has.

    Raises:
        SpecError: it holds no text, another form than the wanted one, or may have several.
    """
    certain = _certain(file)
    if certain and file.compression:
        raise SpecError(f"{file.path}: a compressed {certain} file; decompress it first")
    if wanted != "auto":
        return _as_wanted(file, wanted, certain)
    form: Form = certain or _guessed(file)
    if form in ("csv", "tsv"):
        return Source(file, form, _delimiter(file, form))
    return Source(file, form)


def _as_wanted(file: TextFile, wanted: Form, certain: Form | None) -> Source:
    if (certain or wanted) != wanted or (certain is None and wanted in BINARY.values()):
        raise SpecError(
            f"{file.path}: is {certain or 'no such file'}, not {wanted} as format says; set format:"
            " auto"
        )
    return Source(file, wanted, _delimiter(file, wanted) if wanted in ("csv", "tsv") else ",")


def _certain(file: TextFile) -> Form | None:
    """What the first bytes say, where they leave no doubt."""
    head = file.head
    what = "a tar archive" if head[_TAR] == b"ustar" else None
    what = what or next((name for magic, name in _NO_TEXT.items() if head.startswith(magic)), None)
    if what and (b"\0" in head or what == "a PDF"):
        raise SpecError(
            f"{file.path}: {what}, not a text; give the text itself, in one of the forms"
            f" {', '.join(get_args(Form))}"
        )
    return next((form for magic, form in BINARY.items() if head.startswith(magic)), None)


def _guessed(file: TextFile) -> Form:
    """What name and content of a text file say together."""
    if file.encoding == "utf-8" and (position := file.head.find(b"\0")) >= 0:
        raise SpecError(
            f"{file.path}: holds a NUL at byte {position}: no text in UTF-8; if it is UTF-16, save"
            f" it with a byte order mark{FREE_TEXT}"
        )
    named, text = promised(file.path), file.head_text()
    if named in BINARY.values():
        raise SpecError(
            f"{file.path}: named as {named}, but holds none; set format to what it is{FREE_TEXT}"
        )
    if (json_form := _json_form(file, text, named)) is not None:
        return json_form
    if named is not None:
        return named
    if _MARKUP.match(text):
        raise SpecError(
            f"{file.path}: holds markup, whose tags would be read as text; give the text"
            f" alone{FREE_TEXT}"
        )
    if _NUMBERS.fullmatch(text):
        raise SpecError(
            f"{file.path}: holds whole numbers alone; if they are token ids, save them as .npy or"
            f" as JSON lists{FREE_TEXT}"
        )
    if delimiter := _table_delimiter(file, text):
        form = "tsv" if delimiter == "\t" else "csv"
        raise SpecError(
            f"{file.path}: not named as a table, but looks like one (columns"
            f" {text.splitlines()[0][:80]!r}); set format: {form}{FREE_TEXT}"
        )
    return "text"


def promised(path: Path) -> Form | None:
    """The form that a name promises."""
    if path.suffix.lower() in _COMPRESSED_NAMES:
        path = path.with_suffix("")
    return _BY_NAME.get(path.suffix.lower())


def _json_form(file: TextFile, text: str, named: Form | None) -> Form | None:
    """JSON or JSON Lines, where the first character is one of JSON's; `json` where only the whole
    file can tell.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if text.lstrip()[:1] == '"' and named is None:
        whole = lines[: 8 if file.is_whole else max(1, min(8, len(lines) - 1))]
        if len(whole) > 1 and all(_is_json(line) for line in whole):
            raise SpecError(
                f"{file.path}: every line is a text in JSON's quotes; set format: jsonl{FREE_TEXT}"
            )
        return None
    if text.lstrip()[:1] not in ("{", "["):
        return None
    first, is_all = _first_line(file)
    if _is_json(first):
        return "jsonl" if not is_all or (named == "jsonl" and first[0] == "{") else "json"
    # what is spread over lines begins with a line that promises more
    spread = first in ("{", "[", "[{") or first.endswith((",", "{", "["))
    return "jsonl" if named == "jsonl" and not spread else "json"


def _first_line(file: TextFile) -> tuple[str, bool]:
    """The first line that is not blank, up to `_LONG_LINE` characters, and whether nothing follows
    it.
    """
    with file.open_text() as handle:
        while not (line := handle.readline(_LONG_LINE)).strip():
            pass
        while (rest := handle.readline(HEAD)).isspace():
            pass
    return line.strip(), not rest


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _delimiter(file: TextFile, form: Form) -> str:
    """What separates the cells: the character that gives the header most of them."""
    if form == "tsv":
        return "\t"
    lines = file.head_text().splitlines()
    header = next((line for line in lines if line.strip()), "")
    return max(_DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _table_delimiter(file: TextFile, text: str) -> str | None:
    """The delimiter of a text that looks like a table: columns with names, all rows alike."""
    for mark in _DELIMITERS:
        try:
            rows = [row for row in csv.reader(text.splitlines(True), delimiter=mark) if row]
        except csv.Error:
            continue
        if not file.is_whole:
            rows = rows[:-1]
        if len(rows) < 2 or len(rows[0]) < 2 or len({len(row) for row in rows}) > 1:
            continue
        names = [name.strip() for name in rows[0]]
        plain = all(_COLUMN.fullmatch(name) and name.count(" ") < 3 for name in names)
        known = {"text", "content"} & {name.lower() for name in names}
        if plain and len(set(names)) == len(names) and (known or len(rows) > 2):
            return mark
    return None


def names_columns(header: list[str]) -> bool:
    """Whether a table's first row names columns rather than being data."""
    return all(_COLUMN.fullmatch(name.strip()) for name in header)
