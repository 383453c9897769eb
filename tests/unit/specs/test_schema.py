"""The shipped schema is current, and the shipped examples are jobs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprune.specs.core_yaml import CoreLoader
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.schema import job_schema_text

SPECS = Path(__file__).parents[3] / "specs"
EXAMPLES = sorted((SPECS.parent / "examples").glob("**/job.yaml"))


def test_shipped_schema_is_current() -> None:
    shipped = (SPECS / "job.schema.json").read_text(encoding="utf-8")
    assert shipped == job_schema_text(), (
        "run: python -m rayprune.specs.schema > specs/job.schema.json"
    )


def test_schema_describes_the_job() -> None:
    schema = json.loads(job_schema_text())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "rayprune job"
    assert schema["required"] == ["model", "calibration"]
    assert list(schema["properties"]) == list(JobSpec.model_fields)
    assert not schema["additionalProperties"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_loads(path: Path) -> None:
    load_job(path)


ROOT = SPECS.parent
REQUIRED = {"model": {"path": "m"}, "calibration": {"path": "c"}}


def documented() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every job, and every part of one, that stands in an example or a document."""
    for path in EXAMPLES:
        yield str(path.relative_to(ROOT)), yaml.load(path.read_text(), CoreLoader)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, block in enumerate(re.findall(r"```ya?ml\n(.*?)```", path.read_text(), re.S)):
            content = yaml.load(block, CoreLoader)
            if isinstance(content, dict) and content.keys() <= JobSpec.model_fields.keys():
                whole = {name: REQUIRED[name] | content.get(name, {}) for name in REQUIRED}
                yield f"{path.relative_to(ROOT)}-{number}", content | whole


SHORT: list[dict[str, Any]] = [
    {"method": "stat"},
    {"method": "trsp"},
    {"method": {"scale": "gradients"}},
    {"method": {"name": "obs", "rounds": 3}},
    {"budget": {"per_layer": True, "allocation": "curves"}},
    {"budget": {"per_layer": True, "allocation": {"name": "search", "generations": 3}}},
    {"budget": {"allocation": {}}},
    {"memory": {"worker": "8GiB"}, "recover": None, "evaluation": None},
]
WRONG: list[dict[str, Any]] = [
    {"method": "stta"},
    {"method": {"name": "stta"}},
    {"method": {"rounds": 3}},
    {"budget": {"allocation": "curve"}},
    {"budget": {"allocation": {"samples": 4}}},
    {"memory": None},
    {"extra": 1},
]
JOBS = dict(documented()) | {str(part): REQUIRED | part for part in SHORT}


def test_documents_hold_jobs() -> None:
    assert len(dict(documented())) > len(EXAMPLES) > 4


@pytest.fixture(scope="module")
def validator() -> Any:
    """Of the shipped schema."""
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(json.loads(job_schema_text()))


@pytest.mark.parametrize("name", JOBS)
def test_the_schema_accepts_what_the_loader_accepts(name: str, validator: Any) -> None:
    load_job(JOBS[name])
    assert [error.message for error in validator.iter_errors(JOBS[name])] == []


@pytest.mark.parametrize("part", WRONG, ids=str)
def test_the_schema_refuses_what_the_loader_refuses(part: dict[str, Any], validator: Any) -> None:
    with pytest.raises(SpecError):
        load_job(REQUIRED | part)
    assert not validator.is_valid(REQUIRED | part)


def test_names_alone_stand_in_the_schema() -> None:
    """The least of it, where no validator is installed."""
    schema = json.loads(job_schema_text())
    assert {"stat", "trsp"} <= set(schema["properties"]["method"]["anyOf"][0]["enum"])
    budget = schema["$defs"]["BudgetSpec"]["properties"]
    assert "curves" in budget["allocation"]["anyOf"][0]["enum"]
