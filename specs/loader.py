"""From a job file, or a mapping, and `--set` overrides to a validated job, and back to a canonical
file.

Every value keeps the line, the mapping or the override it came from, so that an error names the
place to correct.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

from rayprune.specs.core_yaml import MAX_DEPTH, CoreDumper
from rayprune.specs.errors import SpecError
from rayprune.specs.explain import KeyPath, explain, holds_names, models, parts
from rayprune.specs.job import HUB_NAME, JobSpec
from rayprune.specs.located import Located, shown
from rayprune.specs.recipe import given_by, recipe_of, with_recipe
from rayprune.specs.section import named
from rayprune.specs.texts import PathMarker
from rayprune.specs.yaml_file import UNUSABLE, Builder, parse_value, parse_yaml, read_text

ANY_NAME = "*"
"""In a key path: a name that the user has chosen."""
MAPPING = "the job's mapping"
"""What errors name in place of a file and a line."""


def load_job(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> JobSpec:
    """Read, override and validate a job: a YAML file, or a mapping of sections as a file has them.

    Relative paths in a file start from the file's folder, those in a mapping and in overrides
    (`section.field=value`) from the current directory.

    Raises:
        SpecError: the file cannot be read, or it does not describe a job; one line per problem.
    """
    return read_job(source, overrides)[0]


def read_job(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[JobSpec, Located]:
    """A job as `load_job` gives it, and what was said of it: every value, a recipe's too, with the
    place it comes from.

    Raises:
        SpecError: as `load_job` says.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    root, found = (
        (_of_mapping(source), []) if isinstance(source, Mapping) else _of_file(Path(source))
    )
    root, problems = _apply(root, overrides)
    root = _resolve_paths(with_recipe(root), _marked(_is_path), _marked(_may_be_name))
    problems = found + problems
    job: JobSpec | None = None
    try:
        job = JobSpec.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        problems += explain(error, root, JobSpec)
        if any(detail["type"] == "value_error" for detail in error.errors()):
            problems += _reminder(root)
    if job is None or problems:
        raise SpecError("\n".join(problems))
    return job, root


def _reminder(root: Located) -> list[str]:
    """What a recipe gives, where fields do not go together: one of them may be its."""
    found = recipe_of(root)
    if found is None:
        return []
    given = ", ".join(given_by(found))
    return [
        f"recipe {found.name} gives {given}; set in the job what is to be otherwise, and a whole"
        " section to null"
    ]


def _of_file(path: Path) -> tuple[Located, list[str]]:
    """The content of a job file, and what is wrong with it."""
    file = Builder(str(path), os.path.abspath(path.parent), has_lines=True)
    root = parse_yaml(read_text(path, "the job file"), file)
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
    elif isinstance(plain, str) and UNUSABLE.search(plain):
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


def _apply(root: Located, overrides: Iterable[str]) -> tuple[Located, list[str]]:
    problems: list[str] = []
    short, given = _marked(_is_short), list[list[str]]()
    for override in overrides:
        try:
            keys, value, found = _override(override)
            inside = [each for each in given if len(each) > len(keys)]
            if lost := [each for each in inside if each[: len(keys)] == keys]:
                raise SpecError(
                    f"--set {override}: takes the place of --set {'.'.join(lost[0])}, which stands"
                    " before it; give the whole section first, then its fields"
                )
            given.append(keys)
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
    builder = Builder(
        f"--set {text if text.isprintable() else shown(text)}", os.getcwd(), has_lines=False
    )
    return keys, parse_value(value, builder), builder.problems


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


def paths_in(job: JobSpec) -> dict[str, str]:
    """All paths that a job gives, by the options that do; a name on the Hub is none."""
    fields, names = _marked(_is_path), _marked(_may_be_name)

    def found(value: object, at: KeyPath, option: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from found(item, _inside(at, key), f"{option}.{key}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from found(item, at, f"{option}.{number}")
        elif isinstance(value, str) and at in fields and not (at in names and job.model.on_hub):
            yield option.removeprefix("."), value

    return dict(found(job.model_dump(mode="json"), (), ""))


def _is_path(part: object) -> bool:
    return isinstance(part, PathMarker)


def _may_be_name(part: object) -> bool:
    return isinstance(part, PathMarker) and part.or_name


def _is_short(part: object) -> bool:
    """Whether a name stands for a section."""
    return isinstance(part, BeforeValidator) and part.func is named


@cache
def _marked(marked: Callable[[object], bool]) -> frozenset[KeyPath]:
    """The key paths of a job's fields that are marked so."""
    return frozenset(_fields(JobSpec, marked))


def _fields(
    model: type[BaseModel], marked: Callable[[object], bool], prefix: KeyPath = ()
) -> Iterator[KeyPath]:
    """The key paths of all fields that are marked so."""
    for name, info in model.model_fields.items():
        if any(marked(part) for part in (*info.metadata, *parts(info.annotation))):
            yield (*prefix, name)
        inside = (*prefix, name, ANY_NAME) if holds_names(info.annotation) else (*prefix, name)
        for section in models(info.annotation):
            yield from _fields(section, marked, inside)


@cache
def _chosen_names() -> frozenset[KeyPath]:
    """The key paths of a job's fields whose keys are names that the user chooses."""
    return frozenset(_fields(JobSpec, lambda part: get_origin(part) is dict))


def _inside(at: KeyPath, key: str) -> KeyPath:
    return (*at, ANY_NAME if at in _chosen_names() else key)


def _resolve_paths(
    node: Located, fields: Set[KeyPath], or_names: Set[KeyPath], at: KeyPath = ()
) -> Located:
    """Absolute paths in these fields; in some of them a name on the Hub is left, unless there is
    such a folder.
    """
    if isinstance(node.value, dict):
        return replace(
            node,
            value={
                key: _resolve_paths(item, fields, or_names, _inside(at, key))
                for key, item in node.value.items()
            },
        )
    if isinstance(node.value, list):
        items = [_resolve_paths(item, fields, or_names, at) for item in node.value]
        return replace(node, value=items)
    # an empty path is left for the validation to refuse
    if at in fields and isinstance(node.value, str) and node.value:
        path = os.path.abspath(os.path.join(node.folder, os.path.expanduser(node.value)))
        is_name = at in or_names and HUB_NAME.fullmatch(node.value) and not os.path.lexists(path)
        return node if is_name else replace(node, value=path)
    return node
