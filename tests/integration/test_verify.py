"""From the report to the model's folder: nothing in a finished run can be another thing unseen."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rayprune.orchestrator.execution.records import sealed
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import VerificationError
from rayprune.specs.loader import load_job
from rayprune.workers.store.files import record_of
from tests.conftest import edit_json, edit_manifest, flip_bit, seal_report, write_job
from tests.helpers import quiet
from tests.models import build_model

SHARD = "model/model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with an evaluation."""
    folder = tmp_path_factory.mktemp("verify")
    text = folder / "held_out.txt"
    text.write_text("Nothing of this stands in the other text, as far as anybody knows. " * 20)
    evaluation = {"path": str(text), "window": 32, "max_windows": 4}
    model = build_model(folder / "dense", num_hidden_layers=1)
    job = write_job(folder / "job.yaml", text_file, model, evaluation=evaluation)
    run_job(load_job(job), folder / "run", quiet)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def better(run: Path) -> None:
    """Perplexities of the report, by somebody who knows how it is sealed."""
    value = json.loads((run / "report.json").read_text())
    value["perplexity"]["after"] /= 2
    (run / "report.json").write_text(json.dumps(sealed(value)))


def other_part(run: Path) -> None:
    """Another shard, by somebody who writes the records above it anew."""
    flip_bit(run / SHARD)
    record = record_of(run / SHARD)
    edit_manifest(
        run / "model", lambda value: value["files"][Path(SHARD).name].update(sha256=record.sha256)
    )
    seal_report(run)


def linked(run: Path) -> None:
    (run / SHARD).rename(run.parent / "elsewhere")
    (run / SHARD).symlink_to(run.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no report": (lambda r: (r / "report.json").unlink(), "report.json"),
    "no content": (lambda r: (r / "report.json").write_text("{}"), "report.json"),
    "torn report": (lambda r: (r / "report.json").write_text('{"a'), "report.json"),
    "edited report": (lambda r: edit_json(r / "report.json", rayprune_version="9"), "report.json"),
    "no records": (lambda r: edit_json(r / "report.json", records=None), "report.json"),
    "another perplexity": (better, "its report tells"),
    "edited page": (lambda r: (r / "report.html").write_text("<p>"), "report.html"),
    "edited card": (lambda r: (r / "model/README.md").write_text("# Best"), "README.md"),
    "edited job": (lambda r: (r / "job.yaml").write_text("{}"), "job.yaml"),
    "edited plan": (lambda r: edit_json(r / "plan.json", tasks=[]), "plan.json"),
    "no plan": (lambda r: (r / "plan.json").unlink(), "plan.json"),
    "a task is gone": (lambda r: shutil.rmtree(r / "tasks/outer"), "outer"),
    "edited units": (
        lambda r: edit_json(r / "tasks/layer-0000/manifest.json", info={"kept": {}}),
        "layer-0000",
    ),
    "hidden files": (lambda r: edit_json(r / "tasks/outer/manifest.json", files={}), "outer"),
    "other record": (
        lambda r: edit_manifest(r / "tasks/outer", lambda value: value["info"].update(n=1)),
        "outer",
    ),
    "a bit of a layer": (lambda r: flip_bit(r / "tasks/layer-0000/layer.safetensors"), "layer-00"),
    "a bit of a shard": (lambda r: flip_bit(r / SHARD), "model-00002"),
    "a missing shard": (lambda r: (r / SHARD).unlink(), "model-00002"),
    "a linked shard": (linked, "is a link"),
    "another shard": (other_part, "does not hold what layer-0000 has made"),
    "edited config": (lambda r: edit_json(r / "model/config.json", a=1), "config.json"),
    "foreign code": (lambda r: (r / "model/modeling_llama.py").touch(), "modeling_llama.py"),
    "a foreign shard": (lambda r: (r / "model/model.safetensors").touch(), "model.safetensors"),
    "a foreign folder": (
        lambda r: shutil.copytree(r / "tasks/outer", r / "model/original"),
        "original",
    ),
    "tokens": (lambda r: flip_bit(r / "tasks/calibration-tokens/tokens.safetensors"), "tokens"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_not_as_it_was_written_is_named(kind: str, run: Path) -> None:
    damage, words = DAMAGES[kind]
    damage(run)
    with pytest.raises(VerificationError) as error:
        verify_run(run)
    assert words in str(error.value)


def test_a_whole_run_is_whole_wherever_it_lies(run: Path) -> None:
    assert {"source", "layer-0000", "outer", "export", "evaluate-after"} <= set(verify_run(run))
