"""A method that ranks is two files: its options, and the function that ranks. No other file
changes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import MakeJob, MakeModel

ROOT = Path(__file__).parents[2]
OPTIONS = '''
"""Options of a ranking by number."""
from typing import Literal
from rayprune.specs.methods.options import MethodOptions, RankedGroup

class ToyOptions(MethodOptions):
    """The units with the highest numbers stay, or the lowest ones."""

    name: Literal["toy"] = "toy"
    highest: bool = True
    """Which."""

    @property
    def comparable_scores(self) -> bool:
        """A number is a number."""
        return True

    def ranking_flops(self, group: RankedGroup) -> int:
        """As many as may be seen in the plan."""
        return 10**12 + group.removed
'''
RANKING = '''
"""Ranking by number."""
import torch

def scores(statistic, weight_DF, unit_columns, num_kept, options):
    """A unit's number, over how many there are."""
    count = weight_DF.shape[1] // unit_columns
    numbers = torch.arange(count, dtype=torch.float64) / count
    return numbers if options.highest else -numbers

def rank(statistic, weight_DF, unit_columns, counts, options):
    """By score."""
    return scores(statistic, weight_DF, unit_columns, 0, options).argsort(descending=True)
'''


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """All of the code, and a new method's two files."""
    folder = tmp_path / "code"
    shutil.copytree(
        ROOT / "rayprune", folder / "rayprune", ignore=shutil.ignore_patterns("__pycache__")
    )
    specs, workers = folder / "rayprune" / "specs", folder / "rayprune" / "workers"
    (specs / "methods" / "ranking" / "toy.py").write_text(OPTIONS)
    (workers / "numerics" / "methods" / "toy.py").write_text(RANKING)
    return folder


def rayprune(code: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rayprune.orchestrator.cli", *map(str, words)],
        cwd=code,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def done(code: Path, *words: object) -> str:
    """What a command that must succeed shows."""
    result = rayprune(code, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_method_of_two_files_prunes_a_model(
    code: Path, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense, budget = make_model(), {"kv_groups": 1, "round_to": 8}
    job = make_job(dense, budget=budget, method={"name": "toy"}, correction={"damping": 1e6})
    done(code, "run", job, "--out", tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert all(layer["selection_flops"] > 10**12 for layer in plan["layers"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == {"name": "toy", "highest": True}
    before = load_file(dense / "model.safetensors")
    for file in sorted((tmp_path / "run" / "model").glob("*.safetensors")):
        for name, up_FD in load_file(file).items():
            if name.endswith("up_proj.weight"):
                assert up_FD.equal(before[name][-len(up_FD) :]), "the highest numbers stay"


@pytest.mark.slow
def test_errors_the_schema_the_mask_and_the_threshold_know_it(
    code: Path, make_model: MakeModel, make_job: MakeJob
) -> None:
    job = make_job(make_model())
    wrong = rayprune(code, "validate", job, "--set", "method.name=toi")
    assert '"toy"' in wrong.stderr
    assert 'did you mean "toy"?' in wrong.stderr
    wrong = rayprune(code, "validate", job, "--set", "method=toy", "--set", "method.highst=true")
    assert 'method.highst: unknown field; did you mean "highest"?' in wrong.stderr
    schema = json.loads(done(code, "schema"))
    assert "toy" in schema["$defs"]["DressOptions"]["properties"]["mask"]["enum"]
    assert schema["$defs"]["ToyOptions"]["properties"]["highest"]["description"] == "Which."
    done(code, "validate", job, "--set", "method.name=dress", "--set", "method.mask=toy")
    spread = ["--set", "budget.per_layer=true", "--set", "budget.allocation=threshold"]
    done(code, "validate", job, "--set", "method=toy", *spread)
