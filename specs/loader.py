"""From a job file, or a mapping, and `--set` overrides to a validated job, and back to a canonical
file.

Every value keeps the line, the mapping or the override it came from, so that an error names the
place to correct.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

from rayprune.specs.core_yaml import (
    CORE_SCHEMA,
    MAX_DEPTH,
    NUMBER_TAGS,
    TAG,
    CoreDumper,
    CoreLoader,
)
from rayprune.specs.errors import SpecError
from rayprune.specs.explain import KeyPath, Located, explain, models, parts, shown
from rayprune.specs.job import JobSpec, PathMarker
from rayprune.specs.section import named

MAX_FILE_BYTES = 2**20
MAX_VALUES = 10_000
MAX_DIGITS = 1000
MAPPING = "the job's mapping"
"""What errors name in place of a file and a line."""

# No file name, and no JSON text, can hold a NUL or half a surrogate pair.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(slots=True)
class _Builder:
    """Turns composed YAML nodes into located values; what is wrong with them is collected in
    `problems`.
    """

    name: str
    folder: str
    has_lines: bool
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
            if key_node.tag != TAG + "str":
                given = (
                    shown(key_node.value)
                    if isinstance(key_node, yaml.ScalarNode)
                    else "a list or mapping"
                )
                self.problems.append(f"{where}: {given} is not a field name; correct it")
                continue
            key = self._scalar(key_node, where)
            if key in items:
                self.problems.append(
                    f"{where}: duplicate key {shown(key)}, first given at {items[key].where};"
                    " remove one"
                )
            items.setdefault(key, item)
        return items

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        text, kind = node.value, node.tag.replace(TAG, "!!")
        if kind == "!!str" and isinstance(node, yaml.ScalarNode):
            if _UNUSABLE.search(text):
                self.problems.append(
                    f"{where}: {shown(text)} holds a NUL or half a surrogate pair; remove it"
                )
            return _UNUSABLE.sub("?", text)
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


def load_job(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> JobSpec:
    """Read, override and validate a job: a YAML file, or a mapping of sections as a file has them.

    Relative paths in a file start from the file's folder, those in a mapping and in overrides
    (`section.field=value`) from the current directory.

    Raises:
        SpecError: the file cannot be read, or it does not describe a job; one line per problem.
    """
    root, found = (
        (_of_mapping(source), []) if isinstance(source, Mapping) else _of_file(Path(source))
    )
    root, problems = _apply(root, overrides)
    root = _resolve_paths(
        root, frozenset(_fields(JobSpec, lambda part: isinstance(part, PathMarker)))
    )
    problems = found + problems
    job: JobSpec | None = None
    try:
        job = JobSpec.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        problems += explain(error, root)
    if job is None or problems:
        raise SpecError("\n".join(problems))
    return job


def _of_file(path: Path) -> tuple[Located, list[str]]:
    """The content of a job file, and what is wrong with it."""
    file = _Builder(str(path), os.path.abspath(path.parent), has_lines=True)
    root = _parse(_read(path), file)
    if not isinstance(root.value, dict):
        raise SpecError(
            "\n".join(
                file.problems
                or [f"{root.where}: the file must be a mapping of sections, such as `model:`"]
            )
        )
    return root, file.problems


def _of_mapping(value: object, depth: int = 0) -> Located:
    """What a caller gave, as if it had been read: nothing but what a file can hold."""
    if depth > MAX_DEPTH:
        raise SpecError(f"{MAPPING}: more than {MAX_DEPTH} levels; does it hold itself?")
    plain: Any = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise SpecError(f"{MAPPING}: {strange[0]!r} is not a field name; correct it")
        plain = {key: _of_mapping(item, depth + 1) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        plain = [_of_mapping(item, depth + 1) for item in value]
    elif not isinstance(plain, str | int | float | None):
        raise SpecError(
            f"{MAPPING}: {value!r} is a {type(value).__name__}; write it as text, number, list or"
            " mapping"
        )
    elif isinstance(plain, str) and _UNUSABLE.search(plain):
        raise SpecError(f"{MAPPING}: {plain!r} holds a NUL or half a surrogate pair; remove it")
    return Located(plain, MAPPING, os.getcwd())


def dump_job(job: JobSpec) -> str:
    """The whole job, defaults included, as YAML that `load_job` reads back to an equal job."""
    # Without a bound on the width no text is folded over lines.
    text: str = yaml.dump(
        job.model_dump(mode="json"),
        Dumper=CoreDumper,
        sort_keys=False,
        allow_unicode=True,
        width=2**31,
    )
    return text


def differing_fields(a: JobSpec, b: JobSpec) -> list[str]:
    """The options in which the results of two jobs differ, as lines such as `budget.sparsity: 0.2
    -> 0.3`.
    """
    return list(differences(a.result_part(), b.result_part()))


def differences(a: object, b: object, name: str = "") -> Iterator[str]:
    """Where two JSON documents differ, as such lines."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield f"{name}: {json.dumps(a, ensure_ascii=False)} -> {json.dumps(b, ensure_ascii=False)}"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpecError(
            f"{path}: cannot read the job file: {error.strerror}; check the path and its"
            " permissions"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise SpecError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is this a job file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(
            f"{path}:{line}: not valid UTF-8 at byte {error.start}; save the file as UTF-8"
        ) from error


def _parse(text: str, builder: _Builder) -> Located:
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


def _number(text: str) -> int | float:
    if CORE_SCHEMA[TAG + "int"].match(text):
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _apply(root: Located, overrides: Iterable[str]) -> tuple[Located, list[str]]:
    problems: list[str] = []
    short = frozenset(
        _fields(JobSpec, lambda part: isinstance(part, BeforeValidator) and part.func is named)
    )
    for override in overrides:
        try:
            keys, value, found = _override(override)
            root = _assign(root, keys, value, short)
        except SpecError as error:
            found = [str(error)]
        problems += found
    return root, problems


def _override(text: str) -> tuple[list[str], Located, list[str]]:
    name, equals, value = text.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise SpecError(
            f"--set {text}: not an override; write section.field=value, such as budget.sparsity=0.3"
        )
    builder = _Builder(f"--set {text}", os.getcwd(), has_lines=False)
    return keys, _parse(value, builder), builder.problems


def _assign(
    node: Located, keys: Sequence[str], value: Located, short: Set[KeyPath], at: KeyPath = ()
) -> Located:
    """A copy of `node` with the value at the key path; null and missing sections on the way are
    created, `short` names written out.
    """
    if not keys:
        return value
    if node.value is None:
        node = replace(value, value={})
    if isinstance(node.value, str) and at in short:
        node = replace(node, value={"name": node})
    if not isinstance(node.value, dict):
        raise SpecError(
            f"{value.where}: {keys[0]!r} cannot be set inside {shown(node.plain())}, which is no"
            " section; correct the name"
        )
    child = node.child(keys[0]) or replace(value, value=None)
    return replace(
        node, value={**node.value, keys[0]: _assign(child, keys[1:], value, short, (*at, keys[0]))}
    )


def _fields(
    model: type[BaseModel], marked: Callable[[object], bool], prefix: KeyPath = ()
) -> Iterator[KeyPath]:
    """The key paths of all fields that are marked so."""
    for name, info in model.model_fields.items():
        if any(marked(part) for part in (*info.metadata, *parts(info.annotation))):
            yield (*prefix, name)
        for section in models(info.annotation):
            yield from _fields(section, marked, (*prefix, name))


def _resolve_paths(node: Located, fields: frozenset[KeyPath], at: KeyPath = ()) -> Located:
    if isinstance(node.value, dict):
        return replace(
            node,
            value={
                key: _resolve_paths(item, fields, (*at, key)) for key, item in node.value.items()
            },
        )
    if isinstance(node.value, list):
        return replace(node, value=[_resolve_paths(item, fields, at) for item in node.value])
    # an empty path is left for the validation to refuse
    if at in fields and isinstance(node.value, str) and node.value:
        return replace(
            node, value=os.path.abspath(os.path.join(node.folder, os.path.expanduser(node.value)))
        )
    return node
