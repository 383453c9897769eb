"""Validation errors in the user's words: which line or override, what was found, what is wanted,
and what was probably meant.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rayprune.specs.core_yaml import CORE_SCHEMA, NUMBER_TAGS
from rayprune.specs.located import Located, shown

KeyPath: TypeAlias = tuple[str | int, ...]

# What a value must be, by pydantic's error type. The braces are filled from the error's context.
_EXPECTATIONS = {
    "int_type": "an integer",
    "float_type": "a number",
    "int_parsing": "an integer",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping, from names of your own",
    "model_type": "a section of fields",
    "greater_than": "greater than {gt:.15g}",
    "greater_than_equal": "at least {ge:.15g}",
    "less_than": "less than {lt:.15g}",
    "less_than_equal": "at most {le:.15g}",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_short": "a text of at least {min_length} character(s)",
    "too_short": "a list of at least {min_length} value(s)",
    "too_long": "a list of at most {max_length} value(s)",
}


@dataclass(frozen=True, slots=True)
class _Target:
    """What an error is about: the key path, its declared type, the place to name and the section
    that holds it.
    """

    path: KeyPath
    annotation: Any
    where: str
    section: Any


def _target(loc: KeyPath, root: Located, model: type[BaseModel]) -> _Target:
    """Follow an error's location, leaving out the names pydantic gives to the branches of a
    union.
    """
    target, node = _Target((), model, root.where, None), root
    for key in loc:
        declared = [
            model.model_fields[key].annotation
            for model in models(target.annotation)
            if key in model.model_fields
        ]
        child = node.child(key)
        if not declared and child is None:
            target = replace(target, annotation=_branch(target.annotation, key))
            continue
        annotation = target.annotation if isinstance(key, int) else tuple(declared)
        if holds_names(target.annotation):
            annotation = tuple(models(target.annotation))
        where = child.where if child else target.where
        target = _Target((*target.path, key), annotation, where, target.annotation)
        node = child or replace(node, value=None)
    return target


def explain(error: ValidationError, root: Located, model: type[BaseModel]) -> list[str]:
    """One line per wrong field of what was to be such a model; the errors of a union's branches
    become one.
    """
    targets: dict[KeyPath, _Target] = {}
    details: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in map(_on_its_tag, error.errors(include_url=False)):
        target = _target(detail["loc"], root, model)
        targets[target.path] = target
        details.setdefault(target.path, []).append(detail)
    # pydantic calls a list too short when only its values are wrong: then the values alone are
    # reported.
    faulty_lists = {path[:-1] for path in details if path and isinstance(path[-1], int)}
    return [_line(targets[path], details[path]) for path in details if path not in faulty_lists]


def _branch(annotation: Any, name: object) -> Any:
    """The model of a discriminated union with that name, or all of the annotation where a union has
    no names.
    """
    named = [
        model
        for model in models(annotation)
        if "name" in model.model_fields and model.model_fields["name"].default == name
    ]
    return named[0] if named else annotation


def _on_its_tag(detail: ErrorDetails) -> ErrorDetails:
    """An unknown branch of a discriminated union is an unknown value of the field `name`."""
    if detail["type"] != "union_tag_invalid":
        return detail
    return {
        **detail,
        "type": "literal_error",
        "loc": (*detail["loc"], "name"),
        "input": detail["ctx"]["tag"],
    }


def _line(target: _Target, details: Sequence[ErrorDetails]) -> str:
    name = "".join(
        f"[{key}]" if isinstance(key, int) else f".{key}" for key in target.path
    ).removeprefix(".")
    return ": ".join(filter(None, (target.where, name, _problem(target, details))))


def _problem(target: _Target, details: Sequence[ErrorDetails]) -> str:
    detail = details[0]
    if detail["type"] == "missing":
        return "is required; add it"
    if detail["type"] == "extra_forbidden":
        known = [name for model in models(target.section) for name in model.model_fields]
        return (
            "unknown field;"
            f" {_suggestion(target.path[-1], known) or 'known fields: ' + ', '.join(known)}"
        )
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    expected = ", or ".join(dict.fromkeys(_expectation(item, target) for item in details))
    hints = (f"must be {expected} (got {shown(detail['input'])})", _hint(target, details))
    return "; ".join(filter(None, hints))


def _expectation(detail: ErrorDetails, target: _Target) -> str:
    if detail["type"] == "literal_error":
        allowed = [shown(value) for value in _literals(target)]
        return f"one of {', '.join(allowed)}" if len(allowed) > 1 else allowed[0]
    template = _EXPECTATIONS.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else f"valid ({detail['msg']})"


def _hint(target: _Target, details: Sequence[ErrorDetails]) -> str:
    """What to do about a value of the wrong kind, where that can be guessed."""
    value, types = details[0]["input"], {detail["type"] for detail in details}
    if (
        types & {"int_type", "float_type"}
        and isinstance(value, str)
        and any(CORE_SCHEMA[tag].match(value) for tag in NUMBER_TAGS)
    ):
        return "remove the quotes"
    if (percent := _as_fraction(value, details)) is not None:
        return f"as a fraction, {percent:g}% is {percent / 100:g}"
    if "string_type" in types and isinstance(value, (bool, int, float)):
        return "put it in quotes"
    if "model_type" in types and value is None:
        return "add fields to it, or remove it"
    return _suggestion(value, _literals(target)) if "literal_error" in types else ""


def _as_fraction(value: object, details: Sequence[ErrorDetails]) -> float | None:
    """The percents that are meant where a fraction is wanted; None: there are none."""
    if isinstance(value, str):
        percents = re.fullmatch(r"(\d+(\.\d+)?)%", value)
        wanted = any(detail["type"] == "float_type" for detail in details)
        return float(percents[1]) if percents and wanted else None
    bound = details[0].get("ctx", {})
    below_one = 1 in (bound.get("lt"), bound.get("le"))
    return value if below_one and isinstance(value, int | float) and 5 <= value <= 100 else None


def _literals(target: _Target) -> list[Any]:
    """The names that may stand there: in a list those of its items, else those beside lists."""
    listed = [part for part in parts(target.annotation) if get_origin(part) in (list, tuple)]
    inside = [value for part in listed for value in _names(part)]
    if target.path and isinstance(target.path[-1], int) and inside:
        return inside
    return [value for value in _names(target.annotation) if value not in inside] or inside


def _names(annotation: Any) -> list[Any]:
    return [
        value
        for part in parts(annotation)
        if get_origin(part) is Literal
        for value in get_args(part)
    ]


def _suggestion(given: object, known: Iterable[object]) -> str:
    names = [name for name in known if isinstance(name, str)]
    near = difflib.get_close_matches(given, names, n=1) if isinstance(given, str) else []
    return f"did you mean {shown(near[0])}?" if near else ""


def parts(annotation: Any) -> Iterator[Any]:
    """The types and metadata an annotation is composed of, itself included; a tuple is several
    annotations.
    """
    yield annotation
    if get_origin(annotation) is not Literal:
        for argument in annotation if isinstance(annotation, tuple) else get_args(annotation):
            yield from parts(argument)


def holds_names(annotation: Any) -> bool:
    """Whether a field is a mapping whose keys the user chooses."""
    return any(get_origin(part) is dict for part in parts(annotation))


def models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models an annotation mentions."""
    return [
        part for part in parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)
    ]
