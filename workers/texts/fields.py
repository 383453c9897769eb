"""What a record holds: the field that is a document, and whether that is text, a chat or token
ids. No torch.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayprune.specs.errors import SpecError

BY_DEFAULT = ("text", "content", "messages", "conversations", "input_ids")
"""Fields that are taken without being named, the first that is there."""
_IN_JSON = ("messages", "conversations", "input_ids")
"""Fields whose text is JSON, where a table holds nothing but text."""
_MOST_ID = 2**31
_NO_SUCH = object()
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A document of messages."""

    messages: Sequence[Message]


@dataclass(frozen=True)
class TokenIds:
    """A document of token ids."""

    ids: Sequence[int]


Document = str | Chat | TokenIds


def choose_field(names: Sequence[str], texts: Sequence[str], where: str) -> str:
    """The field that holds the documents, of all `names` and of those that hold text.

    Raises:
        SpecError: several could, or none.
    """
    if set(names) == {"role", "content"} or set(names) == {"from", "value"}:
        raise SpecError(
            f"{where}: is one message, not a chat; put the messages of a chat into a list under"
            " 'messages', or set field: content to take each for a text"
        )
    for name in BY_DEFAULT:
        if name in names:
            return name
    if len(texts) == 1:
        return texts[0]
    if texts:
        raise SpecError(
            f"{where}: several fields hold text: {listed(texts)}; set field to one of them"
        )
    raise SpecError(
        f"{where}: no key 'text'; set field to the key that holds the text: there are"
        f" {listed(names)}"
    )


def field_of(record: Any, where: str) -> str | None:
    """The field that holds the document of a record; None where the record itself is one.

    Raises:
        SpecError: several could, or none.
    """
    if not isinstance(record, dict):
        return None
    return choose_field(
        list(record), [key for key, value in record.items() if isinstance(value, str)], where
    )


def document_of(record: Any, field: str | None, where: str) -> Document:
    """The document of a record.

    Raises:
        SpecError: there is no such field, or it holds something else.
    """
    if field is None:
        return _document(record, "the record", where)
    value = value_at(record, field)
    if value is _NO_SUCH:
        raise SpecError(f"{where}: {_missing(record, field)}")
    if isinstance(value, str) and field.rpartition(".")[2] in _IN_JSON:
        value = _from_json(value, field, where)
    return _document(value, repr(field), where)


def value_at(record: Any, field: str) -> Any:
    """What stands under a key, or under keys and places joined by dots."""
    if isinstance(record, dict) and field in record:
        return record[field]
    for part in field.split("."):
        if isinstance(record, dict) and part in record:
            record = record[part]
        elif isinstance(record, list) and part.isdecimal() and int(part) < len(record):
            record = record[int(part)]
        else:
            return _NO_SUCH
    return record


def has_field(record: Any, field: str) -> bool:
    """Whether something stands there, as `value_at` looks for it."""
    return value_at(record, field) is not _NO_SUCH


def missing_field(field: str, names: Sequence[str]) -> str:
    """That there is no such field, and which there are."""
    near = difflib.get_close_matches(field, names, n=1)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    return f"no key {field!r}; set field to the key that holds the text: {hint} {listed(names)}"


def listed(names: Iterable[str]) -> str:
    """Names for a message, shortened."""
    shown = [name if len(name) < 40 else f"{name[:37]}..." for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict) and ("role" in message or "from" in message)
            for message in value
        )
    )


def says_something(chat: list[Message]) -> bool:
    """Whether any message has the key for its words; records may have speakers too."""
    words = {"role": ("content", "tool_calls"), "from": ("value",)}
    return any(
        speaker in message and not message.keys().isdisjoint(keys)
        for message in chat
        for speaker, keys in words.items()
    )


def is_ids(value: Any) -> bool:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _missing(record: Any, field: str) -> str:
    if isinstance(record, dict):
        return missing_field(field, list(record))
    return f"no key {field!r}; set field to the key that holds the text: it has none"


def _document(value: Any, name: str, where: str) -> Document:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SpecError(
                f"{where}: {name} holds half a surrogate pair, which is no text"
            ) from None
        return value
    if is_ids(value):
        return TokenIds(_checked_ids(value, name, where))
    if is_chat(value):
        return Chat(value)
    what = {dict: "an object", list: "a list", bytes: "bytes", type(None): "nothing"}.get(
        type(value), f"the value {value!r:.40}"
    )
    inside = f": {listed(map(str, value))}" if isinstance(value, dict) else ""
    raise SpecError(
        f"{where}: {name} holds no text, no chat and no token ids, but {what}{inside}; set field to"
        " the key that does, with dots for a key inside another"
    )


def _checked_ids(ids: list[int], name: str, where: str) -> list[int]:
    if ids and not (min(ids) >= 0 and max(ids) < _MOST_ID):
        wrong = next(token for token in ids if not 0 <= token < _MOST_ID)
        raise SpecError(
            f"{where}: {name} holds {wrong}, which is no token id; leave padding and labels out"
        )
    return ids


def _from_json(text: str, field: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SpecError(
            f"{where}: {field!r} is text, but neither JSON of messages nor of token ids; set field"
            " to the column that holds the documents"
        ) from None
