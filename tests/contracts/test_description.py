"""One description of a model: a config is read once, in one room, and nothing else knows a family.

Checked on the source, and by counting.
"""

import ast
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Model
from rayprune.workers.model.families import family_named, model_types
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.decoder import Decoder
from tests.conftest import MakeJob, MakeModel
from tests.helpers import families

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "workers" / "model"
READ = {
    # the stock class's own config, handed on to the class of a layer
    "workers/network/building.py": {"network.get_submodule(model.backbone).config"},
    # which attention transformers has chosen for a whole model
    "workers/network/decoding.py": {"network.config"},
    # of the demo's model the traces of the file that it was read from are taken out
    "workers/tools/demo.py": {"model.config"},
    # the document that is written; of it nothing is read
    "orchestrator/stages/export.py": {"written.config"},
}
"""Where something called `config` is a model's, and what for."""
PLACES = re.compile(r"\b(self_attn|mlp)\b|model\.layers\b")
TYPES = re.compile(rf"(?<![\w-])({'|'.join(model_types())})(?![\w-]|\.cpp)")
NAMES = {"workers/texts/pieces.py": {"gpt2", "llama", "qwen2"}}
"""Names that are somebody else's: llama.cpp's of tokenizers."""


@cache
def files() -> dict[str, ast.Module]:
    """Every file of ours outside the room, parsed."""
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("specs", "workers", "orchestrator")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_relative_to(ROOM)
    }


@cache
def walked(tree: ast.AST) -> list[ast.AST]:
    """All nodes of a tree."""
    return list(ast.walk(tree))


def texts(tree: ast.AST) -> Iterator[str]:
    """All string literals, pieces of f-strings too; not docstrings."""
    documents = {id(node.value) for node in walked(tree) if isinstance(node, ast.Expr)}
    for node in walked(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if id(node) not in documents else []


def attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    yield from (node for node in walked(tree) if isinstance(node, ast.Attribute))


def imported(tree: ast.AST) -> set[str]:
    """Names that are imported from modules, in full."""
    return {
        f"{node.module}.{alias.name}"
        for node in walked(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def config_reads(tree: ast.AST) -> set[str]:
    """Expressions that end in `.config`, in the source's words."""
    return {ast.unparse(node) for node in attributes(tree) if node.attr == "config"}


def key_reads(tree: ast.AST) -> set[str]:
    """What is called `config` and of which keys are looked up."""
    looked_up = [node.value for node in walked(tree) if isinstance(node, ast.Subscript)]
    looked_up += [node.value for node in attributes(tree) if node.attr in ("get", "items", "raw")]
    names = {ast.unparse(node) for node in looked_up}
    return {name for name in names if name.split(".")[-1] in ("config", "_config")}


def places(tree: ast.AST) -> set[str]:
    """Where Llama has its modules: in strings, as attributes, and the layers of a network (not of a
    checkpoint's description, which has the same names).
    """
    found = {text for text in texts(tree) if PLACES.search(text)}
    for node in attributes(tree):
        if node.attr in ("self_attn", "mlp"):
            found.add(ast.unparse(node))
        if node.attr == "layers" and isinstance(node.value, ast.Attribute):
            owner = node.value
            if owner.attr == "model" and not ast.unparse(owner.value).endswith("checkpoint"):
                found.add(ast.unparse(node))
    return found


BAD = """
def work(checkpoint, network, job, config):
    '''Where self_attn is, of a llama.'''
    a = checkpoint.config["hidden_size"] + network.config.hidden_size
    b = config.get("heads")
    c = network.model.layers[0].self_attn, f"model.layers.{a}."
    d = checkpoint.model.layers
    if job == "gpt2":
        raise ValueError(f"of {a} llama models")
"""


def test_the_rules_see_what_they_look_for() -> None:
    tree = ast.parse(BAD)
    assert config_reads(tree) == {"checkpoint.config", "network.config"}
    assert key_reads(tree) == {"checkpoint.config", "config"}
    assert places(tree) == {
        "network.model.layers",
        "network.model.layers[0].self_attn",
        "model.layers.",
    }
    assert [text for text in texts(tree) if TYPES.search(text)] == ["gpt2", " llama models"]


def test_configs_are_read_in_one_room() -> None:
    for file, tree in files().items():
        assert config_reads(tree) == READ.get(file, set()), file
        assert not key_reads(tree), file
        assert "rayprune.workers.model.config.Config" not in imported(tree), file


def test_nothing_knows_where_a_family_has_its_modules() -> None:
    assert {file: found for file, tree in files().items() if (found := places(tree))} == {}


def test_nothing_knows_a_family_by_name() -> None:
    for file, tree in files().items():
        assert {text for text in texts(tree) if TYPES.search(text)} == NAMES.get(file, set()), file
        families = "rayprune.workers.model.families"
        assert not {name for name in imported(tree) if name.startswith(families)}, file


def test_a_family_is_one_file_of_its_own() -> None:
    """No file of a family names another type, but for the one that it is written as, and that of
    the text model that it holds.
    """
    folder, written_as = (ROOM / "families", {"llama": {"mistral", "granite"}, "qwen2": {"llama"}})
    for name in model_types():
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        literals = {text for text in texts(tree) if text in model_types()}
        family = family_named(name)
        held = {family.text_type} if isinstance(family, Backbone) else set()
        assert literals - {name} <= written_as.get(name, set()) | held, name
    assert {family_named(name).architecture for name in model_types()}


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model types that are described from now on."""
    calls: list[str] = []
    describe = Decoder.describe

    def counting(family: Decoder, config: Config) -> Model:
        calls.append(config.model_type)
        return describe(family, config)

    monkeypatch.setattr(Decoder, "describe", counting)
    return calls


@pytest.mark.parametrize("model_type", families())
@pytest.mark.parametrize("budget", [{}, {"per_layer": True}], ids=["one width", "per layer"])
def test_a_plan_describes_its_model_once(
    model_type: str,
    budget: dict[str, bool],
    described: list[str],
    make_model: MakeModel,
    make_job: MakeJob,
) -> None:
    folder = make_model(model_type)
    fixed = open_checkpoint(folder).model.layers[0].group("neurons").fixed
    described.clear()
    job = make_job(folder, budget=budget, export={"pad": bool(budget)})
    assert main(["plan", str(job)]) == (2 if fixed else 0)
    assert described == [model_type]


@pytest.mark.model
def test_the_plan_of_the_demo_describes_its_model_once(described: list[str]) -> None:
    assert main(["plan", str(ROOT / "examples" / "smollm2" / "job.yaml")]) == 0
    assert described == ["llama"]


def test_a_large_model_is_planned_in_a_moment(described: list[str]) -> None:
    """126 layers, alike: half a second of work, and the bound is far from it."""
    start = time.process_time()
    assert main(["plan", str(ROOT / "examples" / "plans" / "llama-3.1-405b" / "job.yaml")]) == 0
    taken = time.process_time() - start
    assert described == ["llama"]
    assert taken < 5
