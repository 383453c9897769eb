"""From a job file and `--set` overrides to a validated job, and back to a canonical file.

Every value keeps the line or the override it came from, so that an error names the place to correct.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from specs.errors import SpecError
from specs.job import JobSpec, PathMarker

MAX_FILE_BYTES = 2**20
MAX_ALIASES = 100
MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_DIGITS = 1000

KeyPath: TypeAlias = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    _TAG + "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    _TAG + "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    _TAG + "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    _TAG + "float": re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
}
# No file name, and no JSON text, can hold a NUL or half a surrogate pair.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_NUMBER_TAGS = (_TAG + "int", _TAG + "float")

# What a value must be, by pydantic's error type. The braces are filled from the error's context.
_EXPECTATIONS = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a section of fields",
    "greater_than": "greater than {gt:.15g}",
    "greater_than_equal": "at least {ge:.15g}",
    "less_than": "less than {lt:.15g}",
    "less_than_equal": "at most {le:.15g}",
    "string_too_short": "a text of at least {min_length} character(s)",
    "too_short": "a list of at least {min_length} value(s)",
    "too_long": "a list of at most {max_length} value(s)",
}


class _Loader(yaml.SafeLoader):
    """Composes one YAML document with the scalars of the YAML 1.2 core schema, within bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # the stubs leave it out
        self._aliases += self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._aliases > MAX_ALIASES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_ALIASES} aliases", mark)
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would read as something else."""


# The key None stands for scalars with any first character.
_Loader.yaml_implicit_resolvers = {None: list(_CORE_SCHEMA.items())}
_Dumper.yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: list(_CORE_SCHEMA.items())}


@dataclass(frozen=True, slots=True)
class _Located:
    """A value, the place to name in an error, and the folder its relative paths start from."""

    value: Any
    where: str
    folder: str

    def child(self, key: str | int) -> "_Located | None":
        """The value under a key, or None."""
        if isinstance(self.value, list):
            return self.value[key] if isinstance(key, int) and key < len(self.value) else None
        return self.value.get(key) if isinstance(self.value, dict) else None

    def plain(self) -> Any:
        """The value without the places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


@dataclass(slots=True)
class _Builder:
    """Turns composed YAML nodes into located values; what is wrong with them is collected in `problems`."""

    name: str
    folder: str
    has_lines: bool
    problems: list[str] = field(default_factory=list)
    _values: int = 0

    def build(self, node: yaml.Node, where: str, depth: int = 0) -> _Located:
        """The located value of a node. Aliases are expanded, so depth and number of values are bounded here again."""
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise SpecError(f"{where}: more than {MAX_DEPTH} levels or {MAX_VALUES} values, aliases expanded; make the file smaller")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._located(self._mapping(node, depth), where)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return self._located([self.build(item, self.where(item), depth + 1) for item in node.value], where)
        return self._located(self._scalar(node, where), where)

    def where(self, node: yaml.Node) -> str:
        """The place of a node, as errors name it."""
        return self.at(node.start_mark.line)

    def at(self, line: int, column: int | None = None) -> str:
        """The place of a line and column, both counted from 0, as errors name it."""
        if not self.has_lines:
            return self.name
        return f"{self.name}:{line + 1}" if column is None else f"{self.name}:{line + 1}:{column + 1}"

    def _located(self, value: Any, where: str) -> _Located:
        return _Located(value, where, self.folder)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, _Located]:
        items: dict[str, _Located] = {}
        for key_node, value_node in node.value:
            where = self.where(key_node)
            item = self.build(value_node, where, depth + 1)
            if key_node.tag != _TAG + "str":
                given = _shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self.problems.append(f"{where}: {given} is not a field name; correct it")
                continue
            key = self._scalar(key_node, where)
            if key in items:
                self.problems.append(f"{where}: duplicate key {_shown(key)}, first given at {items[key].where}; remove one")
            items.setdefault(key, item)
        return items

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        text, kind = node.value, node.tag.replace(_TAG, "!!")
        if kind == "!!str" and isinstance(node, yaml.ScalarNode):
            if _UNUSABLE.search(text):
                self.problems.append(f"{where}: {_shown(text)} holds a NUL or half a surrogate pair; remove it")
            return _UNUSABLE.sub("?", text)
        if node.tag not in _CORE_SCHEMA or not isinstance(node, yaml.ScalarNode):
            self.problems.append(f"{where}: unexpected tag {kind}; remove it")
        elif not _CORE_SCHEMA[node.tag].match(text) or len(text) > MAX_DIGITS:
            self.problems.append(f"{where}: {_shown(text)} cannot be read as {kind}; correct it")
        else:
            return _number(text) if node.tag in _NUMBER_TAGS else {"t": True, "f": False}.get(text[:1].lower())
        return None


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read, override and validate a job.

    Relative paths in the file start from the file's folder, those in overrides (`section.field=value`) from the current directory.

    Raises:
        SpecError: the file cannot be read or does not describe a job; one line per problem.
    """
    file = _Builder(str(path), os.path.abspath(path.parent), has_lines=True)
    root = _parse(_read(path), file)
    if not isinstance(root.value, dict):
        raise SpecError("\n".join(file.problems or [f"{root.where}: the file must be a mapping of sections, such as `model:`"]))
    root, problems = _apply(root, overrides)
    root = _resolve_paths(root, frozenset(_path_fields(JobSpec)))
    problems = file.problems + problems
    job: JobSpec | None = None
    try:
        job = JobSpec.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        problems += _explain(error, root)
    if job is None or problems:
        raise SpecError("\n".join(problems))
    return job


def dump_job(job: JobSpec) -> str:
    """The whole job, defaults included, as YAML that `load_job` reads back to an equal job."""
    # Without a bound on the width no text is folded over lines.
    text: str = yaml.dump(job.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return text


def differing_fields(a: JobSpec, b: JobSpec) -> list[str]:
    """The options in which the results of two jobs differ, as lines such as `budget.sparsity: 0.2 -> 0.3`."""
    return list(_differences(a.result_part(), b.result_part(), ""))


def _differences(a: object, b: object, name: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield f"{name}: {json.dumps(a, ensure_ascii=False)} -> {json.dumps(b, ensure_ascii=False)}"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot read the job file: {error.strerror}; check the path and its permissions") from error
    if len(content) > MAX_FILE_BYTES:
        raise SpecError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is this a job file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{path}:{line}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _parse(text: str, builder: _Builder) -> _Located:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = builder.at(mark.line, mark.column) if mark else builder.name
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise SpecError(f"{place}: not valid YAML: {problem}; correct the syntax") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = builder.at(before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise SpecError(f"{place}: the character U+{ord(text[error.position]):04X} is not allowed in YAML; remove it") from error
    except (ValueError, OverflowError) as error:  # PyYAML does not check that an escape such as "\UFFFFFFFF" is a character
        raise SpecError(f"{builder.name}: not valid YAML: {error}; correct the number or escape sequence") from error
    if node is None:
        return _Located(None, builder.name, builder.folder)
    return builder.build(node, builder.where(node))


def _number(text: str) -> int | float:
    if _CORE_SCHEMA[_TAG + "int"].match(text):
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _apply(root: _Located, overrides: Iterable[str]) -> tuple[_Located, list[str]]:
    problems: list[str] = []
    for override in overrides:
        try:
            keys, value, found = _override(override)
            root = _assign(root, keys, value)
        except SpecError as error:
            found = [str(error)]
        problems += found
    return root, problems


def _override(text: str) -> tuple[list[str], _Located, list[str]]:
    name, equals, value = text.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise SpecError(f"--set {text}: not an override; write section.field=value, such as budget.sparsity=0.3")
    builder = _Builder(f"--set {text}", os.getcwd(), has_lines=False)
    return keys, _parse(value, builder), builder.problems


def _assign(node: _Located, keys: Sequence[str], value: _Located) -> _Located:
    """A copy of `node` with the value at the key path; null and missing sections on the way are created."""
    if not keys:
        return value
    if node.value is None:
        node = replace(value, value={})
    if not isinstance(node.value, dict):
        raise SpecError(f"{value.where}: {keys[0]!r} cannot be set inside {_shown(node.plain())}, which is no section; correct the name")
    child = node.child(keys[0]) or replace(value, value=None)
    return replace(node, value={**node.value, keys[0]: _assign(child, keys[1:], value)})


def _parts(annotation: Any) -> Iterator[Any]:
    """The types and metadata an annotation is composed of, itself included."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _parts(argument)


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _path_fields(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, info in model.model_fields.items():
        if any(isinstance(part, PathMarker) for part in (*info.metadata, *_parts(info.annotation))):
            yield (*prefix, name)
        for section in _models(info.annotation):
            yield from _path_fields(section, (*prefix, name))


def _resolve_paths(node: _Located, fields: frozenset[KeyPath], at: KeyPath = ()) -> _Located:
    if isinstance(node.value, dict):
        return replace(node, value={key: _resolve_paths(item, fields, (*at, key)) for key, item in node.value.items()})
    if at in fields and isinstance(node.value, str) and node.value:  # an empty path is left for the validation to refuse
        return replace(node, value=os.path.abspath(os.path.join(node.folder, os.path.expanduser(node.value))))
    return node


@dataclass(frozen=True, slots=True)
class _Target:
    """What an error is about: the key path, its declared type, the place to name and the section that holds it."""

    path: KeyPath
    annotation: Any
    where: str
    section: Any


def _target(loc: KeyPath, root: _Located) -> _Target:
    """Follow an error's location, leaving out the names pydantic gives to the branches of a union."""
    target, node = _Target((), JobSpec, root.where, None), root
    for key in loc:
        declared = [model.model_fields[key].annotation for model in _models(target.annotation) if key in model.model_fields]
        child = node.child(key)
        if not declared and child is None:
            continue
        annotation = target.annotation if isinstance(key, int) else next(iter(declared), None)
        where = child.where if child else target.where
        target = _Target((*target.path, key), annotation, where, target.annotation)
        node = child or replace(node, value=None)
    return target


def _explain(error: ValidationError, root: _Located) -> list[str]:
    """One line per wrong field; the errors of a union's branches become one."""
    targets: dict[KeyPath, _Target] = {}
    details: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        target = _target(detail["loc"], root)
        targets[target.path] = target
        details.setdefault(target.path, []).append(detail)
    # pydantic calls a list too short when only its values are wrong: then the values alone are reported.
    faulty_lists = {path[:-1] for path in details if path and isinstance(path[-1], int)}
    return [_line(targets[path], details[path]) for path in details if path not in faulty_lists]


def _line(target: _Target, details: Sequence[ErrorDetails]) -> str:
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in target.path).removeprefix(".")
    return ": ".join(filter(None, (target.where, name, _problem(target, details))))


def _problem(target: _Target, details: Sequence[ErrorDetails]) -> str:
    detail = details[0]
    if detail["type"] == "missing":
        return "is required; add it"
    if detail["type"] == "extra_forbidden":
        known = [name for model in _models(target.section) for name in model.model_fields]
        return f"unknown field; {_suggestion(target.path[-1], known) or 'known fields: ' + ', '.join(known)}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    expected = ", or ".join(dict.fromkeys(_expectation(item, target) for item in details))
    hints = (f"must be {expected} (got {_shown(detail['input'])})", _hint(target, details))
    return "; ".join(filter(None, hints))


def _expectation(detail: ErrorDetails, target: _Target) -> str:
    if detail["type"] == "literal_error":
        allowed = [_shown(value) for value in _literals(target.annotation)]
        return f"one of {', '.join(allowed)}" if len(allowed) > 1 else allowed[0]
    template = _EXPECTATIONS.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else f"valid ({detail['msg']})"


def _hint(target: _Target, details: Sequence[ErrorDetails]) -> str:
    """What to do about a value of the wrong kind, where that can be guessed."""
    value, types = details[0]["input"], {detail["type"] for detail in details}
    if types & {"int_type", "float_type"} and isinstance(value, str) and any(_CORE_SCHEMA[tag].match(value) for tag in _NUMBER_TAGS):
        return "remove the quotes"
    if "string_type" in types and isinstance(value, (bool, int, float)):
        return "put it in quotes"
    if "model_type" in types and value is None:
        return "add fields to it, or remove it"
    return _suggestion(value, _literals(target.annotation)) if "literal_error" in types else ""


def _literals(annotation: Any) -> list[Any]:
    return [value for part in _parts(annotation) if get_origin(part) is Literal for value in get_args(part)]


def _suggestion(given: object, known: Iterable[object]) -> str:
    names = [name for name in known if isinstance(name, str)]
    near = difflib.get_close_matches(given, names, n=1) if isinstance(given, str) else []
    return f"did you mean {_shown(near[0])}?" if near else ""


def _shown(value: object) -> str:
    """A value as YAML would have it on one line, shortened."""
    text = json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())
    return text if len(text) <= 80 else text[:77] + "..."
