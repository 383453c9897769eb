"""The shipped schema is current, and the shipped examples are jobs."""

import json
from pathlib import Path

import pytest

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
