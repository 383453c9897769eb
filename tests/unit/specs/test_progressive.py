"""Progressive pruning's options: the schedule, the gate's bounds, and what is refused."""

import math
from typing import Any

import pytest

from rayprune.orchestrator.planning.steps import relative_sparsity
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.specs.methods.gate import GateSpec

JOB: dict[str, Any] = {"model": {"path": "model"}, "calibration": {"path": "text"}}


def job_of(sparsity: float = 0.4, budget: Any = None, **method: Any) -> JobSpec:
    sections = {"method": {"name": "progressive", **method}}
    return load_job(JOB | sections | {"budget": {"sparsity": sparsity, **(budget or {})}})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4 * part for part in (37 / 64, 7 / 8, 63 / 64, 1)]),
        ({"steps": 2}, [0.4 * 7 / 8, 0.4]),
        ({"steps": 4, "schedule": "linear"}, [0.1, 0.2, 0.3, 0.4]),
        ({"schedule": [0.25, 0.4]}, [0.25, 0.4]),
        ({"steps": 1}, [0.4]),
    ],
)
def test_the_schedule(options: dict[str, Any], expected: list[float]) -> None:
    steps = job_of(**options).steps
    assert steps is not None
    assert steps.sparsities == pytest.approx(expected)
    assert steps.sparsities[-1] == 0.4


@pytest.mark.parametrize(
    ("wrong", "budget", "words"),
    [
        ({"schedule": [0.2, 0.1]}, {}, "must rise"),
        ({"schedule": [0.2, 0.3]}, {}, "ends at 0.3, but budget.sparsity is 0.4"),
        ({"schedule": [0.2, 0.4], "steps": 3}, {}, "leave steps out"),
        ({"schedule": "cubik"}, {}, 'did you mean "cubic"'),
        ({"schedule": []}, {}, "a list of at least 1 value"),
        ({"inner": "dress"}, {}, "method.inner.name"),
        ({"gate": {"agreement": 1.5}}, {}, "method.gate.agreement"),
        ({}, {"kv_bytes_per_token": 99}, "leave out budget.kv_bytes_per_token"),
        ({"inner": {"name": "composite", "norm": 0, "sensitivity": 0}}, {}, "are both 0"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], budget: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        job_of(budget=budget, **wrong)


def test_a_type_on_disk_that_the_next_step_would_compute_in_is_refused() -> None:
    sections = {"method": "progressive", "export": {"dtype": "float16"}}
    with pytest.raises(SpecError, match=r"set model\.dtype too"):
        load_job(JOB | sections)
    load_job(JOB | sections, ["model.dtype=float32"])


@pytest.mark.parametrize(("original", "current"), [(1000, 1000), (997, 801), (10**12 + 7, 10**12)])
def test_what_a_step_leaves_is_counted_by_the_original_to_the_parameter(
    original: int, current: int
) -> None:
    for sparsity in (0.1, 0.2, 0.25, 1 / 3, 0.7):
        relative = relative_sparsity(sparsity, original, current)
        allowed = (1 - relative) * current + 1e-6  # as a budget is counted
        most = math.floor((1 - sparsity) * original + 1e-6)
        if relative <= 0:
            assert current <= most
        else:
            assert most <= allowed < most + 1


def test_a_gate_names_the_bounds_that_are_not_kept() -> None:
    gate = GateSpec(perplexity=1.5, divergence=0.2, agreement=0.8)
    assert gate.exceeded(1.5, 0.2, 0.8) == []
    assert [words.split()[0] for words in gate.exceeded(1.6, 0.1, 0.7)] == [
        "perplexity",
        "agreement",
    ]
    assert gate.exceeded(1.0, math.nan, 1.0) == ["divergence nan nats per token, at most 0.2"]
    assert GateSpec().exceeded(9e9, 9e9, 0.0) == []
