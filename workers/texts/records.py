"""The records of a file, form by form, one after another. No torch."""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from rayprune.specs.errors import SpecError
from rayprune.workers.texts.fields import (
    BY_DEFAULT,
    choose_field,
    field_of,
    has_field,
    is_chat,
    is_ids,
    missing_field,
    says_something,
)
from rayprune.workers.texts.files import MOST_LINE, bounded_lines
from rayprune.workers.texts.forms import FREE_TEXT, Source, names_columns

MOST_JSON = 2**30
"""Bytes or characters of the largest JSON document that is read; JSON Lines may be of any size."""
_ROWS, _IDS = 256, 2**16
_LOOKED_AT = 32
"""Rows of a table in text by which columns of numbers are told from text."""
Records = Iterator[tuple[str, Any]]
"""Records with the place to name in an error."""


def records_of(source: Source, field: str | None) -> tuple[str | None, Records]:
    """The records of a file, and the field of each that holds the document (None: it is one).

    Raises:
        SpecError: now or on the way: the file is not what its form says, or has no such field.
    """
    readers: dict[str, Callable[[Source, str | None], tuple[str | None, Records]]] = {
        "jsonl": _json_lines,
        "json": _json,
        "csv": _table,
        "tsv": _table,
        "parquet": _parquet,
        "arrow": _arrow,
        "npy": _token_array,
    }
    return readers[source.form](source, field)


def _json_lines(source: Source, field: str | None) -> tuple[str | None, Records]:
    def records() -> Records:
        with source.file.open_text() as handle:
            for number, line in enumerate(bounded_lines(handle, source.file.path), 1):
                if line.strip():
                    where = f"{source.file.path}:{number}"
                    yield where, _loaded(line, where)

    if field is None:
        for where, first in records():
            return field_of(first, where), records()
    return field, records()


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{where}: no JSON; set format: text for plain text, or mend it ({str(error)[:80]})"
        ) from None


def _json(source: Source, field: str | None) -> tuple[str | None, Records]:
    path, text = source.file.path, ""
    too_large = source.file.compression is None and path.stat().st_size > MOST_JSON
    if not too_large:
        with source.file.open_text() as handle:
            text = handle.read(MOST_JSON + 1)
    if too_large or len(text) > MOST_JSON:
        raise SpecError(
            f"{path}: a JSON document of more than {MOST_JSON:,} characters; write it as JSON Lines"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{path}: starts like JSON but is none ({str(error)[:80]}); mend it, write one value to"
            f" a line (JSON Lines){FREE_TEXT}"
        ) from None
    found, field = _inside(value, field, str(path))
    if field is None and found:
        field = field_of(found[0], f"{path}: element 1")
    return field, ((f"{path}: element {number}", item) for number, item in enumerate(found, 1))


def _inside(value: Any, field: str | None, path: str) -> tuple[list[Any], str | None]:
    """The records of a JSON document, and the field inside each."""
    if value in ([], {}):
        raise SpecError(f"{path}: is empty; give a text")
    if isinstance(value, list):
        named = field is not None and has_field(value[0], field)
        alone = is_ids(value) or (is_chat(value) and says_something(value) and not named)
        return ([value] if alone else value), field
    if not isinstance(value, dict):
        raise SpecError(f"{path}: a single value of JSON, no documents{FREE_TEXT}")
    if field is not None:
        head, _, rest = (field, "", "") if field in value else field.partition(".")
        inside: Any = value.get(head)
        if _holds_records(inside) and not rest.partition(".")[0].isdecimal():
            return inside, rest or None
        lists = [key for key, item in value.items() if _holds_records(item)]
        if head not in value and len(lists) == 1:
            return value[lists[0]], field
        return [value], field
    lists = [key for key, item in value.items() if _holds_records(item)]
    known = [name for name in BY_DEFAULT if name in value]
    if known and known[0] not in lists:
        return [value], None
    chosen = known[0] if known else lists[0] if len(lists) == 1 else None
    if chosen is not None:
        return value[chosen], None
    if lists:
        raise SpecError(
            f"{path}: several lists: {', '.join(lists)}; set field to the one that holds the"
            " documents, with dots for a key inside"
        )
    return [value], None


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and not is_ids(value) and not is_chat(value)


def _table(source: Source, field: str | None) -> tuple[str | None, Records]:
    """A table in text, by the reader of the standard library: strict about quotes, which Arrow's
    is not.
    """
    path = source.file.path
    csv.field_size_limit(MOST_LINE)

    def rows() -> Iterator[tuple[int, list[str]]]:
        with source.file.open_text(newline="") as handle:
            reader = csv.reader(
                bounded_lines(handle, path), delimiter=source.delimiter, strict=True
            )
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except csv.Error as error:
                raise SpecError(
                    f"{path}:{reader.line_num}: no row of a table ({error}); mend its"
                    f" quotes{FREE_TEXT}"
                ) from None

    looked_at = [row for _, row in islice(rows(), _LOOKED_AT)]
    if not looked_at:
        return field, iter(())
    header = [name.strip() for name in looked_at[0]]
    if field is None:
        if not names_columns(header):
            raise SpecError(
                f"{path}: its first row does not name columns ({', '.join(header)[:80]!r}); add a"
                f" row of names{FREE_TEXT}"
            )
        texts = [name for place, name in enumerate(header) if _has_text(looked_at[1:], place)]
        field = choose_field(header, texts, str(path))
    place = _place_of(field, header, str(path))

    def records() -> Records:
        for number, (line, row) in enumerate(rows()):
            if len(row) != len(header):
                raise SpecError(
                    f"{path}:{line}: {len(row)} cells where the first row has {len(header)}; mend"
                    f" the row or its quotes{FREE_TEXT}"
                )
            if number:
                yield f"{path}:{line}", {field: row[place]}

    return field, records()


def _has_text(rows: list[list[str]], place: int) -> bool:
    """Whether a column holds something that is no number."""
    cells = [row[place].strip() for row in rows if place < len(row)]
    return any(cell and not _is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _place_of(field: str, names: list[str], where: str) -> int:
    if field not in names:
        raise SpecError(f"{where}: {missing_field(field, names)}")
    if names.count(field) > 1:
        raise SpecError(f"{where}: {names.count(field)} columns are named {field!r}; rename them")
    return names.index(field)


def _parquet(source: Source, field: str | None) -> tuple[str | None, Records]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = source.file.path
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(source, error) from None
    field, column = _column(source, file.schema_arrow, field)

    def batches() -> Iterator[Any]:
        yield from file.iter_batches(batch_size=_ROWS, columns=[column])

    return field, _rows(source, batches(), column)


def _arrow(source: Source, field: str | None) -> tuple[str | None, Records]:
    import pyarrow as pa

    path = str(source.file.path)
    try:
        if source.file.head.startswith(b"ARROW1"):
            file = pa.ipc.open_file(pa.OSFile(path))
            schema = file.schema
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            stream = pa.ipc.open_stream(pa.OSFile(path))
            schema, batches = stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(source, error) from None
    field, column = _column(source, schema, field)
    return field, _rows(source, batches, column)


def _column(source: Source, schema: Any, field: str | None) -> tuple[str, str]:
    """The field, and the column it begins in."""
    import pyarrow as pa

    names, where = list(schema.names), str(source.file.path)
    if field is None:
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        texts = [item.name for item in schema if any(is_kind(item.type) for is_kind in kinds)]
        field = choose_field(names, texts, where)
    column = field if field in names else field.partition(".")[0]
    if column not in names:
        column = field  # the message names all of it
    _place_of(column, names, where)
    return field, column


def _rows(source: Source, batches: Iterator[Any], column: str) -> Records:
    """The rows of record batches; only a few at a time become objects of Python."""
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            values = batch.column(column)
            for start in range(0, len(values), _ROWS):
                for value in values.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield f"{source.file.path}: row {number}", {column: value}
    except (pa.ArrowException, OSError) as error:
        raise _damaged(source, error) from None


def _damaged(source: Source, error: Exception) -> SpecError:
    return SpecError(
        f"{source.file.path}: no whole {source.form} file ({str(error)[:200]}); fetch or write it"
        " again"
    )


def _token_array(source: Source, field: str | None) -> tuple[str | None, Records]:
    path = source.file.path
    if field is not None:
        raise SpecError(f"{path}: an array has no field {field!r}; leave field out")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(source, error) from None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise SpecError(
            f"{path}: holds {array.dtype} of shape {array.shape}; token ids are whole numbers, (T,)"
            " or (N, T)"
        )
    rows = array if array.ndim == 2 else array[None]

    def records() -> Records:
        for number, row in enumerate(rows, 1):
            for start in range(0, len(row), _IDS):
                where = f"{path}: row {number}" if array.ndim == 2 else str(path)
                yield where, row[start : start + _IDS].tolist()

    return None, records()
