"""What `import rayprune` promises: its names, their types, and that nothing heavy is imported
before it is used.
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rayprune
from tests.conftest import MakeJob, MakeModel

ROOT = Path(__file__).parents[2]
NAMES = {
    "Event",
    "JobSpec",
    "MachineProfile",
    "ModelError",
    "Plan",
    "Progress",
    "RaypruneError",
    "Report",
    "ResourceError",
    "SpecError",
    "VerificationError",
    "__version__",
    "generate",
    "load_job",
    "load_sparse",
    "plan",
    "read_report",
    "run",
    "validate",
}
LIGHT = """
import sys

def check(*heavy):
    assert not set(heavy) & sys.modules.keys(), set(heavy) & sys.modules.keys()

import rayprune
check("torch", "ray", "transformers", "pydantic", "numpy", "yaml")
job = rayprune.load_job(sys.argv[1])
check("torch", "ray", "transformers", "numpy")
assert rayprune.plan(job, "cpu-core").seconds > 0
assert rayprune.Report and rayprune.Event and rayprune.SpecError and rayprune.__version__
check("torch", "ray", "transformers")
"""


def test_the_names() -> None:
    assert set(rayprune.__all__) == NAMES
    assert set(dir(rayprune)) >= NAMES
    for name in NAMES:
        assert getattr(rayprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        rayprune.prune  # type: ignore[attr-defined] # noqa: B018


def test_a_type_checker_sees_the_same_names_from_the_same_places() -> None:
    tree = ast.parse((ROOT / "rayprune" / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (alias.asname, node.module)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(rayprune._HOME_OF.items())  # type: ignore[attr-defined]
    assert (ROOT / "rayprune" / "py.typed").exists()


def test_the_version_has_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "rayprune.__version__"}


def test_nothing_heavy_is_imported_before_a_run(make_model: MakeModel, make_job: MakeJob) -> None:
    job = make_job(make_model())
    words = [sys.executable, "-c", LIGHT, str(job)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
