"""The architecture, checked on the source: who may import whom, and that everything public is
documented and typed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeJob, MakeModel

ROOT = Path(__file__).parents[2]
LAYERS = ("specs", "workers", "orchestrator")
"""From the bottom up: a package imports from those before it and from itself."""
FILES = {
    ".".join(("rayprune", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for package in LAYERS
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ONLY_IN = {
    "ray": {
        "rayprune.orchestrator.execution.ray_executor",
        "rayprune.orchestrator.execution.ray_train",
        "rayprune.orchestrator.execution.submit",
    },
    "rich": {"rayprune.orchestrator.reporting.progress"},
}
TORCH = {"torch", "transformers", "accelerate"}
WITHOUT_TORCH = {
    "rayprune.workers.model.families",
    "rayprune.workers.model.checkpoint",
    "rayprune.workers.store.files",
    "rayprune.workers.store.shards",
    "rayprune.workers.model.config_patch",
    "rayprune.workers.store.layout",
    "rayprune.workers.model.shapes",
    "rayprune.workers.store.storage",
    "rayprune.workers.texts.chats",
    "rayprune.workers.texts.fields",
    "rayprune.workers.texts.files",
    "rayprune.workers.texts.forms",
    "rayprune.workers.texts.reading",
    "rayprune.workers.texts.records",
}


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imports(tree: ast.AST) -> set[str]:
    """Modules a file imports anywhere in it, by their full names."""
    found = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            found |= {
                (
                    f"{node.module}.{alias.name}"
                    if f"{node.module}.{alias.name}" in FILES
                    else node.module
                )
                for alias in node.names
            }
    return found


IMPORTS = {name: imports(tree) for name, tree in TREES.items()}


def package(module: str) -> str:
    """The package of a module of ours, or a library."""
    return module.removeprefix("rayprune.").split(".")[0]


def definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield f"{prefix}.{node.name}", node
            yield from definitions(node, f"{prefix}.{node.name}")
        else:
            yield from definitions(node, prefix)


DEFINITIONS = dict(item for name, tree in TREES.items() for item in definitions(tree, name))


def test_every_package_is_looked_at() -> None:
    assert len(FILES) > 25
    assert all(f"rayprune.{name}" in FILES for name in LAYERS)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards(name: str) -> None:
    above = LAYERS[LAYERS.index(package(name)) + 1 :]
    assert not {module for module in IMPORTS[name] if package(module) in above}
    assert not {
        module for module in IMPORTS[name] if package(module) in ("tests", "examples", "benchmarks")
    }


@pytest.mark.parametrize("library", ONLY_IN)
def test_one_module_knows_the_library(library: str) -> None:
    assert {
        name for name, modules in IMPORTS.items() if library in map(package, modules)
    } == ONLY_IN[library]


@pytest.mark.parametrize(
    "name", [name for name in FILES if package(name) != "workers" or name in WITHOUT_TORCH]
)
def test_no_torch_outside_the_workers(name: str) -> None:
    assert not TORCH & set(map(package, IMPORTS[name]))


def test_one_module_touches_the_inside_of_transformers() -> None:
    """Others load whole models or tokenizers by the public Auto classes, in places known by
    name.
    """
    users = {name for name, modules in IMPORTS.items() if "transformers" in map(package, modules)}
    assert users == {
        "rayprune.workers.network.layers",
        "rayprune.workers.calibration",
        "rayprune.workers.network.load_check",
        "rayprune.workers.tools.generate",
    }


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for module in sorted(IMPORTS[name] & FILES.keys()):
                visit(module, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def is_public(name: str) -> bool:
    """Whether no part of a dotted name is private, and nothing in it lies inside a function."""
    parts = name.split(".")
    outer = [".".join(parts[:length]) for length in range(1, len(parts))]
    inside = any(
        not isinstance(DEFINITIONS[part], ast.ClassDef) for part in outer if part in DEFINITIONS
    )
    return not inside and not any(part.startswith("_") for part in parts)


def test_everything_public_is_documented() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []
    assert [
        name
        for name, node in DEFINITIONS.items()
        if is_public(name) and not ast.get_docstring(node)
    ] == []


def test_everything_is_typed() -> None:
    untyped = []
    for name, node in DEFINITIONS.items():
        if isinstance(node, ast.ClassDef):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        missing = [
            argument.arg
            for argument in given
            if argument.annotation is None and argument.arg not in ("self", "cls")
        ]
        untyped += [f"{name}({argument})" for argument in missing] + (
            [] if node.returns else [f"{name} -> ?"]
        )
    assert untyped == []


LIGHT_COMMANDS = """
import sys
from rayprune.orchestrator.cli import main

def run(*words):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 0, (words, code)
    heavy = {"torch", "ray", "transformers"} & sys.modules.keys()
    assert not heavy, (words, heavy)

job = sys.argv[1]
run("--help")
run("submit", "--help")
run("schema")
run("validate", job)
run("plan", job)
"""


def test_light_commands_import_neither_torch_nor_ray(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    job = make_job(make_model())
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_COMMANDS, str(job)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for words in ("usage: rayprune", "rayprune job", ": valid", "FFN width"):
        assert words in done.stdout
