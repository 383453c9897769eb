"""A text as pieces of plain text and of token ids, and what was found on the way. No torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayprune.specs.errors import SpecError
from rayprune.specs.texts import TextSpec
from rayprune.workers.texts.chats import chat_ids, plain_messages
from rayprune.workers.texts.fields import Chat, Document, TokenIds, document_of
from rayprune.workers.texts.files import explained, inspect, text_files
from rayprune.workers.texts.forms import Source, recognise
from rayprune.workers.texts.records import records_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = "\n\n"
"""What follows a document, so that the next one begins behind a blank line."""
CHARACTERS_PER_TOKEN = 8
"""So many characters are read for a token that is asked for, at first."""
MOST_CHARACTERS = 2**28
"""So many are read where nothing says how many tokens are needed: all of it must fit the memory."""
_CHUNK = 2**20
QUICK_CHARACTERS = 2**20
"""So many characters are looked at before any work, at most."""
_QUICK_JSON = 2**24
Piece = str | list[int]
Encode = Callable[[str], list[int]]
"""From a text to its token ids."""


@dataclass(frozen=True)
class TextFacts:
    """What a text was found to be, as far as it was read."""

    forms: tuple[str, ...]
    """Forms of its files, with their compression."""
    fields: tuple[str, ...]
    """Keys or columns that the documents stand under."""
    holds: tuple[str, ...]
    """`text`, `chats`, `token ids`."""
    files: int
    """Files that were read, at least in part."""
    documents: int
    """Documents that were begun; a file of plain text is one."""
    characters: int
    """Characters of the documents that are text, and of what is said in chats."""
    tokens: int | None
    """Tokens of what was read; None: not counted."""
    complete: bool
    """Whether that is all of the text."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


class TextReader:
    """Reads a text piece by piece and notes what it finds.

    Without a tokenizer chats give what is said in them.
    """

    def __init__(
        self, spec: TextSpec, tokenizer: "PreTrainedTokenizerBase | None", quick: bool = False
    ) -> None:
        self._spec, self._tokenizer, self._quick = spec, tokenizer, quick
        self._forms, self._fields, self._holds = (
            dict[str, None](),
            dict[str, None](),
            dict[str, None](),
        )
        self._files = self._documents = self._characters = 0
        self._skipped = False

    def pieces(self) -> Iterator[Piece]:
        """The text, in order; documents of text are followed by a blank line, but for a single file
        of plain text, which is taken as it is.

        Raises:
            SpecError: a file cannot be read, or is not what it should be.
        """
        paths = text_files(Path(self._spec.path))
        for path in paths:
            file = inspect(path)
            with explained(path, file):
                source = recognise(file, self._spec.format)
                self._files += 1
                self._forms[source.described] = None
                if source.form == "text":
                    yield from self._plain(source, alone=len(paths) == 1)
                elif self._quick and source.form == "json" and _large(source):
                    self._skipped = True
                else:
                    yield from self._documents_of(source)

    def facts(self, tokens: int | None, complete: bool) -> TextFacts:
        """What was found so far."""
        return TextFacts(
            tuple(self._forms),
            tuple(self._fields),
            tuple(self._holds),
            self._files,
            self._documents,
            self._characters,
            tokens,
            complete and not self._skipped,
        )

    def _plain(self, source: Source, alone: bool) -> Iterator[str]:
        if self._spec.field is not None:
            raise SpecError(
                f"{source.file.path}: plain text has no field {self._spec.field!r}; leave field"
                f" out, or set format to what the file is"
            )
        self._holds["text"] = None
        self._documents += 1
        with source.file.open_text() as handle:
            while chunk := handle.read(_CHUNK):
                self._characters += len(chunk)
                yield chunk
        if not alone:
            yield BETWEEN

    def _documents_of(self, source: Source) -> Iterator[Piece]:
        field, records = records_of(source, self._spec.field)
        if field is not None:
            self._fields[field] = None
        for where, record in records:
            self._documents += 1
            yield from self._piece(document_of(record, field, where), where)

    def _piece(self, document: Document, where: str) -> Iterator[Piece]:
        match document:
            case str():
                self._holds["text"] = None
                self._characters += len(document)
                yield document + BETWEEN
            case TokenIds(ids):
                if ids:
                    self._holds["token ids"] = None
                    yield list(ids)
            case Chat():
                self._holds["chats"] = None
                messages = plain_messages(document.messages, where)
                said = "".join(message.get("content") or "" for message in messages)
                self._characters += len(said)
                if self._tokenizer is None:
                    yield said
                else:
                    yield chat_ids(messages, self._tokenizer, where)


def read_tokens(
    spec: TextSpec,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    special: bool = True,
) -> tuple[list[int], TextFacts]:
    """The text's first `max_tokens` token ids (all of them for None), with `special` tokens as the
    tokenizer adds them by itself; of chats, those of the template; token ids as they are.

    No more of a large file is read than the tokens need.

    Raises:
        SpecError: as `TextReader.pieces`, or there is nothing but blanks.
    """
    budget = MOST_CHARACTERS if max_tokens is None else max_tokens * CHARACTERS_PER_TOKEN
    while True:
        reader = TextReader(spec, tokenizer)
        pieces, complete = _up_to(reader.pieces(), budget)
        ids = _ids_of(
            pieces,
            lambda text: tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"],
        )
        # a cut text's last tokens may differ
        margin = 65 if pieces and isinstance(pieces[-1], str) else 0
        if complete or (max_tokens is not None and len(ids) >= max_tokens + margin):
            _refuse_blank(pieces, spec)
            ids = ids[:max_tokens]
            return ids, reader.facts(len(ids), complete)
        if max_tokens is None:
            raise SpecError(
                f"{spec.path}: more than {MOST_CHARACTERS:,} characters; set evaluation.max_windows"
                " to read less of it"
            )
        budget *= 2


def check_text(
    spec: TextSpec, encode: Encode | None = None, most: int = QUICK_CHARACTERS
) -> tuple[list[int], TextFacts]:
    """Look at the beginning of a text, up to `most` characters: that it exists, which form it has,
    that its first documents have the field, and its tokens; without `encode` only those of token
    ids. Of chats the tokens are those of what is said in them.

    For a check of a job before any work. Where `complete` holds, all of the text was looked at.
    Of a large JSON document only the beginning is looked at, nothing is counted.

    Raises:
        SpecError: the text cannot be read, or is not what it should be.
    """
    reader = TextReader(spec, None, quick=True)
    pieces, complete = _up_to(reader.pieces(), most)
    facts = reader.facts(None, complete)
    if facts.complete:
        _refuse_blank(pieces, spec)
    if encode is None and facts.holds != ("token ids",):
        return [], facts
    ids = _ids_of(pieces, encode or (lambda text: []))
    return ids, replace(facts, tokens=len(ids))


def _refuse_blank(pieces: list[Piece], spec: TextSpec) -> None:
    """Refuse a text of blanks and NULs.

    Raises:
        SpecError: there is something, but nothing else.
    """
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if texts and len(texts) == len(pieces) and not any(_says_something(text) for text in texts):
        size = sum(map(len, texts))
        raise SpecError(
            f"{spec.path}: nothing but blanks and NULs in its {size:,} characters; give a text"
        )


def _says_something(text: str) -> bool:
    return bool(text.replace("\0", " ").strip())


def _large(source: Source) -> bool:
    limit = _QUICK_JSON if source.file.compression is None else _QUICK_JSON // 8
    return source.file.path.stat().st_size > limit


def _up_to(pieces: Iterator[Piece], budget: int) -> tuple[list[Piece], bool]:
    """The first pieces, the last one cut to fit, and whether those are all; a token id counts as
    `CHARACTERS_PER_TOKEN` characters.
    """
    taken: list[Piece] = []
    left = budget
    for piece in pieces:
        taken.append(piece)
        left -= len(piece) * (1 if isinstance(piece, str) else CHARACTERS_PER_TOKEN)
        if left < 0:
            if isinstance(piece, str):
                taken[-1] = piece[:left]
            return taken, False
    return taken, True


def _ids_of(pieces: list[Piece], encode: Encode) -> list[int]:
    """Token ids; text that stands in a row is tokenised as a whole."""
    ids: list[int] = []
    for is_text, run in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            ids += encode("".join(map(str, run)))
        else:
            ids += chain.from_iterable(run)  # type: ignore[arg-type]
    return ids
