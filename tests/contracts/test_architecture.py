"""The architecture, checked on the source: who may import whom, and that everything public is
documented and typed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ONLY_IN = {
    "ray": {
        "rayprune.orchestrator.execution.ray_executor",
        "rayprune.orchestrator.execution.ray_failures",
        "rayprune.orchestrator.execution.ray_metrics",
        "rayprune.orchestrator.execution.ray_probe",
        "rayprune.orchestrator.execution.ray_start",
        "rayprune.orchestrator.execution.submit",
    },
    "rich": {"rayprune.orchestrator.reporting.progress"},
    "matplotlib": {"rayprune.orchestrator.reporting.charts"},
}
TORCH = {"torch", "transformers", "accelerate"}
ROOMS = {
    "specs": set(),
    "workers.machine": {"specs"},
    "workers.model": {"specs"},
    "workers.store": {"specs"},
    "workers.numerics": {"specs", "workers.machine"},
    "workers.texts": {"specs", "workers.model"},
    "workers.stock": {"specs", "workers.machine"},
    "workers.calibration": {"specs", "workers.stock", "workers.texts"},
    "workers.own_text": {
        "specs",
        "workers.calibration",
        "workers.engines",
        "workers.model",
        "workers.network",
        "workers.stock",
        "workers.texts",
    },
    "workers.lm_tasks": {"specs"},
    "workers.tokens": {"specs", "workers.calibration", "workers.model", "workers.texts"},
    "workers.network": {
        "specs",
        "workers.machine",
        "workers.model",
        "workers.numerics",
        "workers.stock",
    },
    "workers.passes": {
        "specs",
        "workers.machine",
        "workers.model",
        "workers.network",
        "workers.numerics",
        "workers.store",
    },
    "workers.training": {
        "specs",
        "workers.calibration",
        "workers.machine",
        "workers.model",
        "workers.network",
        "workers.passes",
        "workers.store",
    },
    "workers.tools": {
        "specs",
        "workers.machine",
        "workers.model",
        "workers.network",
        "workers.texts",
    },
    "workers.formats": {
        "specs",
        "workers.calibration",
        "workers.model",
        "workers.network",
        "workers.store",
        "workers.texts",
    },
    "workers.engines": {
        "specs",
        "workers.model",
        "workers.network",
        "workers.stock",
        "workers.store",
    },
    "workers.workbench": {
        "specs",
        "workers.machine",
        "workers.model",
        "workers.network",
        "workers.numerics",
        "workers.passes",
        "workers.store",
        "workers.texts",
    },
    "workers.steps": {
        "specs",
        "workers.calibration",
        "workers.formats",
        "workers.lm_tasks",
        "workers.machine",
        "workers.model",
        "workers.network",
        "workers.numerics",
        "workers.own_text",
        "workers.passes",
        "workers.store",
        "workers.training",
        "workers.tokens",
        "workers.workbench",
    },
    "workers.worker": {"specs", "workers.machine", "workers.steps", "workers.workbench"},
    "orchestrator.planning": {
        "orchestrator.reporting",  # a plan in a notebook
        "specs",
        "workers.lm_tasks",
        "workers.machine",
        "workers.model",
        "workers.store",
        "workers.texts",
    },
    "orchestrator.execution": {"specs", "workers.machine", "workers.store", "workers.worker"},
    "orchestrator.stages": {
        "orchestrator.execution",
        "orchestrator.planning",
        "specs",
        "workers.machine",
        "workers.model",
        "workers.numerics",
        "workers.store",
        "workers.texts",
    },
    "orchestrator.reporting": {
        "orchestrator.execution",
        "orchestrator.hub",
        "orchestrator.planning",
        "orchestrator.stages",
        "specs",
        "workers.machine",
        "workers.store",
    },
    "orchestrator.hub": {"specs", "workers.model", "workers.store"},
    "orchestrator.run": {
        "orchestrator.execution",
        "orchestrator.planning",
        "orchestrator.reporting",
        "orchestrator.stages",
        "specs",
        "workers.model",
        "workers.store",
    },
    "orchestrator.entry": {
        "orchestrator.execution",
        "orchestrator.hub",
        "orchestrator.planning",
        "orchestrator.reporting",
        "orchestrator.run",
        "specs",
        "workers.machine",
        "workers.model",
        "workers.tokens",
    },
    "orchestrator.points": {
        "orchestrator.entry",
        "orchestrator.execution",
        "orchestrator.reporting",
        "orchestrator.run",
        "specs",
        "workers.store",
    },
    "orchestrator.benched": {
        "orchestrator.execution",
        "orchestrator.reporting",
        "specs",
        "workers.store",
    },
    "orchestrator.publish": {"orchestrator.execution", "orchestrator.reporting", "specs"},
    "orchestrator.tracking": {
        "orchestrator.execution",
        "orchestrator.reporting",
        "specs",
        "workers.store",
    },
    "orchestrator.commands": {
        "orchestrator.entry",
        "orchestrator.benched",
        "orchestrator.execution",
        "orchestrator.planning",
        "orchestrator.points",
        "orchestrator.publish",
        "orchestrator.reporting",
        "orchestrator.tracking",
        "specs",
        "workers.engines",
        "workers.machine",
        "workers.network",
        "workers.store",
        "workers.tools",
    },
    "orchestrator.cli": {"orchestrator.commands", "specs", "workers.machine"},
}
"""The rooms, and the single modules that stand beside them, with the rooms that each may import."""
FOLDERS = [*LAYERS, *(room for room in ROOMS if FILES[f"rayprune.{room}"].stem == "__init__")]
FOLDERS.remove("specs")  # a package that is one room
LAWS = {
    "Neither torch nor ray": {"specs"},
    "knows nothing of Ray": {"workers"},
    "No torch": {"orchestrator", "workers.model", "workers.store"},
    "Knows no model": {"workers.machine", "workers.numerics"},
    "no run folder": {"workers.numerics"},
    "Torch in `checks` alone": {"workers.texts"},
    "the only reader of config keys": {"workers.model"},  # held by test_description.py
    "the only room that touches modules of transformers": {"workers.network"},
}
"""What docstrings of packages and rooms promise, and whose do; held by the tests below."""
WITHOUT_TORCH = LAWS["Neither torch nor ray"] | LAWS["No torch"]
CHECKS = "rayprune.workers.texts.checks"
WRITES_TENSORS = "rayprune.workers.store.files"
"""Without torch at import; a function of it writes safetensors files."""


@cache
def trees() -> dict[str, ast.Module]:
    """Every file of ours, parsed."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


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


@cache
def imported() -> dict[str, set[str]]:
    """What every file of ours imports."""
    return {name: imports(tree) for name, tree in trees().items()}


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


@cache
def defined() -> dict[str, Definition]:
    """Every class and function of ours."""
    return dict(item for name, tree in trees().items() for item in definitions(tree, name))


def test_every_package_is_looked_at() -> None:
    assert len(FILES) > 25
    assert all(f"rayprune.{name}" in FILES for name in LAYERS)


def test_imports_point_downwards() -> None:
    for name, modules in imported().items():
        above = LAYERS[LAYERS.index(package(name)) + 1 :]
        beside = ("tests", "examples", "benchmarks")
        assert not {module for module in modules if package(module) in (*above, *beside)}, name


def test_one_module_knows_the_library() -> None:
    for library, knowing in ONLY_IN.items():
        assert {
            name for name, modules in imported().items() if library in map(package, modules)
        } == knowing


def room_of(module: str) -> str:
    """The room of a module of ours, or the module itself where it stands beside the rooms."""
    parts = module.removeprefix("rayprune.").split(".")
    return parts[0] if parts[0] == "specs" else ".".join(parts[:2])


def law_of(room: str) -> str:
    """What the docstring of a room says, on one line."""
    return " ".join((ast.get_docstring(trees()[f"rayprune.{room}"]) or "").split())


def test_every_room_is_in_the_table_and_states_its_law() -> None:
    found = {room_of(name) for name in FILES} - {"workers", "orchestrator"}
    assert found == ROOMS.keys()
    assert len(FOLDERS) > 12
    assert [room for room in FOLDERS if not law_of(room)] == []


@pytest.mark.parametrize("promise", LAWS)
def test_docstrings_promise_what_is_held(promise: str) -> None:
    """Neither is a law dropped from a docstring, nor does one promise what is not looked at."""
    assert {room for room in FOLDERS if promise in law_of(room)} == LAWS[promise]


def test_rooms_import_what_the_table_allows() -> None:
    """Exactly that: an entry that nothing needs any more goes."""
    wanted: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, modules in imported().items():
        if (room := room_of(name)) in ROOMS:
            wanted[room] |= {room_of(module) for module in modules & FILES.keys()}
    beside = {"workers", "orchestrator"}
    assert {room: found - {room} - beside for room, found in wanted.items()} == ROOMS


def test_rooms_of_the_workers_stand_above_each_other() -> None:
    """No two of them need each other, in whatever round."""
    left = {room: {r for r in ROOMS[room] if r in ROOMS} for room in ROOMS if "workers" in room}
    while left:
        free = [room for room, needs in left.items() if not needs & left.keys()]
        assert free, f"rounds among {sorted(left)}"
        left = {room: needs for room, needs in left.items() if room not in free}


def test_laws_of_imports_follow_from_the_table() -> None:
    for room in LAWS["Knows no model"]:
        assert not {"workers.model", "workers.network", "workers.passes"} & ROOMS[room]
    for room in LAWS["no run folder"]:
        assert "workers.store" not in ROOMS[room]


def test_no_torch_where_none_is_promised() -> None:
    """Not inside functions either."""
    for name, modules in imported().items():
        in_texts = room_of(name) == "workers.texts" and name != CHECKS
        if not in_texts and not {package(name), room_of(name)} & WITHOUT_TORCH:
            continue
        assert not TORCH & set(map(package, modules)), name
        if name != WRITES_TENSORS:
            assert "safetensors.torch" not in modules, name
        at_import = {node.module for node in trees()[name].body if isinstance(node, ast.ImportFrom)}
        assert "safetensors.torch" not in at_import, name


def test_one_room_touches_the_inside_of_transformers() -> None:
    """Others load whole models or tokenizers by the public Auto classes, in places known by
    name.
    """
    users = {
        name
        for name, modules in imported().items()
        if {"transformers", "accelerate"} & set(map(package, modules))
    }
    outside = {name for name in users if room_of(name) != "workers.network"}
    assert outside == {
        "rayprune.workers.calibration",
        "rayprune.workers.own_text",
        "rayprune.workers.stock",
        "rayprune.workers.tokens",
        "rayprune.workers.tools.demo",
    }
    assert users - outside == {
        "rayprune.workers.network.building",
        "rayprune.workers.network.decoding",
        "rayprune.workers.network.greedy",
        "rayprune.workers.network.load_check",
        "rayprune.workers.network.maps",
        "rayprune.workers.network.sampling",
    }
    for name in outside:
        names = {
            alias.name
            for node in nodes(trees()[name])
            if isinstance(node, ast.ImportFrom) and package(str(node.module)) == "transformers"
            for alias in node.names
        }
        known = {"AutoConfig", "AutoTokenizer", "GenerationConfig", "PreTrainedTokenizerBase"}
        # the demo's model is read from a GGUF file, which nothing else does
        whole = {"AutoModelForCausalLM"} if name == "rayprune.workers.tools.demo" else set()
        assert names <= known | whole, name


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for module in sorted(imported()[name] & FILES.keys()):
                visit(module, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def is_public(name: str) -> bool:
    """Whether no part of a dotted name is private, and nothing in it lies inside a function."""
    parts = name.split(".")
    outer = [".".join(parts[:length]) for length in range(1, len(parts))]
    inside = any(
        not isinstance(defined()[part], ast.ClassDef) for part in outer if part in defined()
    )
    return not inside and not any(part.startswith("_") for part in parts)


def test_everything_public_is_documented() -> None:
    assert [name for name, tree in trees().items() if not ast.get_docstring(tree)] == []
    assert [
        name for name, node in defined().items() if is_public(name) and not ast.get_docstring(node)
    ] == []


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton's compiler reads it, which takes no types but its own."""
    return any(ast.unparse(each).startswith("triton.jit") for each in function.decorator_list)


def test_everything_is_typed() -> None:
    untyped = []
    for name, node in defined().items():
        if isinstance(node, ast.ClassDef) or is_kernel(node):
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
    for words in ("usage: rayprune", "rayprune job", ": valid", "FFN channels"):
        assert words in done.stdout
