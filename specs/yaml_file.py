"""YAML documents of a user's as values that know their lines; nothing in them is read as something
else in silence.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayprune.specs.core_yaml import CORE_SCHEMA, MAX_DEPTH, NUMBER_TAGS, TAG, CoreLoader
from rayprune.specs.errors import SpecError
from rayprune.specs.files import read_document
from rayprune.specs.located import Located, shown

MAX_FILE_BYTES = 2**20
MAX_VALUES = 10_000
MAX_DIGITS = 1000

UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""No file name, and no JSON text, can hold a NUL or half a surrogate pair."""


@dataclass(slots=True)
class Builder:
    """Turns composed YAML nodes into located values; what is wrong with them is collected in
    `problems`.
    """

    name: str
    folder: str
    has_lines: bool
    numbers_are_keys: bool = False
    """Whether whole numbers may be keys; they are kept as texts."""
    problems: list[str] = field(default_factory=list)
    _values: int = 0

    def build(self, node: yaml.Node, where: str, depth: int = 0) -> Located:
        """The located value of a node. Aliases are expanded, so depth and number of values are
        bounded here again.
        """
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise SpecError(
                f"{where}: more than {MAX_DEPTH} levels or {MAX_VALUES} values, aliases expanded;"
                " make the file smaller"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self._located(self._mapping(node, depth), where)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return self._located(
                [self.build(item, self.where(item), depth + 1) for item in node.value], where
            )
        return self._located(self._scalar(node, where), where)

    def where(self, node: yaml.Node) -> str:
        """The place of a node, as errors name it."""
        return self.at(node.start_mark.line)

    def at(self, line: int, column: int | None = None) -> str:
        """The place of a line and column, both counted from 0, as errors name it."""
        if not self.has_lines:
            return self.name
        return (
            f"{self.name}:{line + 1}" if column is None else f"{self.name}:{line + 1}:{column + 1}"
        )

    def _located(self, value: Any, where: str) -> Located:
        return Located(value, where, self.folder)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Located]:
        items: dict[str, Located] = {}
        for key_node, value_node in node.value:
            where = self.where(key_node)
            item = self.build(value_node, where, depth + 1)
            if key_node.tag != TAG + "str" and not (
                self.numbers_are_keys and key_node.tag == TAG + "int"
            ):
                given = (
                    shown(key_node.value)
                    if isinstance(key_node, yaml.ScalarNode)
                    else "a list or mapping"
                )
                self.problems.append(f"{where}: {given} is not a field name; correct it")
                continue
            key = key_node.value if key_node.tag != TAG + "str" else self._scalar(key_node, where)
            if key in items:
                self.problems.append(
                    f"{where}: duplicate key {shown(key)}, first given at {items[key].where};"
                    " remove one"
                )
            items.setdefault(key, item)
        return items

    def plain(self, text: str) -> Located:
        """The value of a text without quotes: a number, true, false or null, or else the text as
        it stands.
        """
        bare = text.strip()
        tag = next((tag for tag, form in CORE_SCHEMA.items() if form.match(bare)), None)
        node = yaml.ScalarNode(tag, bare) if tag else yaml.ScalarNode(TAG + "str", text)
        return self._located(self._scalar(node, self.name), self.name)

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        text, kind = node.value, node.tag.replace(TAG, "!!")
        if kind == "!!str" and isinstance(node, yaml.ScalarNode):
            if UNUSABLE.search(text):
                self.problems.append(
                    f"{where}: {shown(text)} holds a NUL or half a surrogate pair; remove it"
                )
            return UNUSABLE.sub("?", text)
        if node.tag not in CORE_SCHEMA or not isinstance(node, yaml.ScalarNode):
            self.problems.append(f"{where}: unexpected tag {kind}; remove it")
        elif not CORE_SCHEMA[node.tag].match(text) or len(text) > MAX_DIGITS:
            self.problems.append(f"{where}: {shown(text)} cannot be read as {kind}; correct it")
        else:
            return (
                _number(text)
                if node.tag in NUMBER_TAGS
                else {"t": True, "f": False}.get(text[:1].lower())
            )
        return None


def read_text(path: Path, what: str) -> str:
    """The text of a document of a user's; `what` names it in errors.

    Raises:
        SpecError: no regular file, too large, not readable, or not UTF-8.
    """
    content = read_document(path, MAX_FILE_BYTES, what)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(
            f"{path}:{line}: not valid UTF-8 at byte {error.start}; save the file as UTF-8"
        ) from error


def parse_yaml(text: str, builder: Builder) -> Located:
    """The located values of a YAML document.

    Raises:
        SpecError: not valid YAML, or beyond the bounds.
    """
    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = builder.at(mark.line, mark.column) if mark else builder.name
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise SpecError(f"{place}: not valid YAML: {problem}; correct the syntax") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = builder.at(before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise SpecError(
            f"{place}: the character U+{ord(text[error.position]):04X} is not allowed in YAML;"
            " remove it"
        ) from error
    # PyYAML does not check that an escape such as "\UFFFFFFFF" is a character
    except (ValueError, OverflowError) as error:
        raise SpecError(
            f"{builder.name}: not valid YAML: {error}; correct the number or escape sequence"
        ) from error
    if node is None:
        return Located(None, builder.name, builder.folder)
    return builder.build(node, builder.where(node))


def parse_value(text: str, builder: Builder) -> Located:
    """The value of an override: what begins as a list, a mapping or a text in quotes is read as in
    a file, all else as `Builder.plain` does, so that no character is lost.

    Raises:
        SpecError: not valid YAML, or a reader of YAML would pass over some of it.
    """
    bare = text.strip()
    if not bare.startswith(("[", "{", "'", '"')):
        return builder.plain(text)
    value = parse_yaml(bare, builder)
    if (lost := _passed_over(bare)) is not None:
        raise SpecError(
            f"{builder.name}: {shown(lost)} would not be kept; put all of a text into one pair of"
            " double quotes, line breaks as \\n"
        )
    return value


def _passed_over(text: str) -> str | None:
    """The first comment of a YAML text, or scalar with a line break, which would become a blank."""
    end = 0
    for token in yaml.scan(text, Loader=CoreLoader):
        start, between = token.start_mark.index, text[end : token.start_mark.index].strip()
        end = token.end_mark.index
        if between:
            return between
        if isinstance(token, yaml.ScalarToken) and "\n" in text[start:end]:
            return text[start:end]
    return None


def _number(text: str) -> int | float:
    if CORE_SCHEMA[TAG + "int"].match(text):
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
