"""Jobs over small models, and what tests do to files. Nothing heavy is imported with it."""

import gc
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}

import pytest
import yaml

from rayprune.orchestrator.execution.records import records, sealed
from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.orchestrator.reporting import charts
from rayprune.workers.store.files import MANIFEST_NAME

MakeModel = Callable[..., Path]
MakeJob = Callable[..., Path]


def pytest_collection_finish() -> None:
    """What is there before the tests stays: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


def undrawn(*_: object, **__: object) -> str:
    """No drawing: each takes a tenth of a second, and few tests look at it."""
    return "<figure></figure>"


REALLY_DRAWN = charts._drawn


@pytest.fixture(scope="session", autouse=True)
def without_drawings() -> Iterator[None]:
    """Pages without their drawings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "_drawn", undrawn)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with their drawings all the same."""
    monkeypatch.setattr(charts, "_drawn", REALLY_DRAWN)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Build a tiny model under the test's folder."""

    def make(model_type: str = "llama", name: str = "dense", **changes: Any) -> Path:
        from tests.models import build_model

        return build_model(tmp_path / name, model_type, **changes)

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English text that every Python brings."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics))[:60_000], encoding="utf-8")
    return path


def write_job(path: Path, text_file: Path, model: Path, **sections: Any) -> Path:
    """Write a job file over a model folder; keyword arguments replace or extend whole sections."""
    document: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {"path": str(text_file), "samples": 16, "sequence_length": 64, "shards": 4},
        "budget": {"sparsity": 0.25, "round_to": 4},
        # on machines with a GPU too: tests/gpu has its own
        "parallel": {"workers": 1, "micro_batch": 2, "device": "cpu"},
        "cluster": {"executor": "in-process"},
    }
    for section, values in sections.items():
        document[section] = document.get(section, {}) | values if values is not None else None
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def make_job(tmp_path: Path, text_file: Path) -> MakeJob:
    """Write a job file into the test's folder, see `write_job`."""

    def make(model: Path, name: str = "job.yaml", **sections: Any) -> Path:
        return write_job(tmp_path / name, text_file, model, **sections)

    return make


@pytest.fixture
def force_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make plans keep things where the test says, not where the budget does."""
    from rayprune.orchestrator.planning import steps

    planned = steps.make_plan

    def force(**memory: Any) -> None:
        def plan(*arguments: Any, **options: Any) -> Any:
            made = planned(*arguments, **options)
            return replace(made, memory=replace(made.memory, **memory))

        monkeypatch.setattr(steps, "make_plan", plan)

    return force


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One private Ray for all tests that need it; jobs with `cluster.address: local` use it as they
    find it, and the workers of the run before.
    """
    import ray

    from rayprune.orchestrator.execution.ray_executor import workers_kept

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    with workers_kept():
        yield
    ray.shutdown()


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    value = {
        key: entry
        for key, entry in (json.loads(path.read_text()) | changes).items()
        if entry is not None
    }
    path.write_text(json.dumps(value))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a task's manifest as somebody would who knows how it is written."""
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(sealed(value)))


def seal_report(run: Path) -> None:
    """Write the report anew over whatever the run folder holds."""
    path = run / REPORT_FILE
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"records": records(run)})))


def flip_bit(file: Path, place: int = -3) -> None:
    """Damage a file; other names of it keep what they have."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.unlink()
    file.write_bytes(data)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
