"""What a second attempt must not take over from the first: layers above another layer, perplexities
in another type, files of an unfinished export.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rayprune.orchestrator.execution.run_folder import RunFolder
from rayprune.orchestrator.run import first_plan, make_executor, run_job
from rayprune.orchestrator.stages import evaluation, texts
from rayprune.orchestrator.stages.context import Context
from rayprune.specs.errors import VerificationError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.store.files import MANIFEST_NAME, commit, read_manifest
from rayprune.workers.store.layout import LAYER_FILE, layer_task, model_folder, task_folder
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet


def test_a_layer_above_another_layer_is_not_taken_over(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """It saw activations that are no more."""
    job = load_job(make_job(make_model(num_hidden_layers=2)))
    run_job(job, tmp_path / "run", quiet)
    folder = task_folder(tmp_path / "run", layer_task(0))
    tensors, done = load_file(folder / LAYER_FILE), read_manifest(folder)
    assert done is not None
    next(iter(tensors.values())).add_(1.0)
    (folder / LAYER_FILE).unlink()  # model/ has the same file under its own name
    save_file(tensors, folder / LAYER_FILE, metadata={"format": "pt"})
    commit(folder, done.task, done.fingerprint, done.files, done.info)
    with pytest.raises(VerificationError, match=r"layer-0001: was made from other inputs"):
        run_job(job, tmp_path / "run", quiet)


@pytest.fixture
def evaluated(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> JobSpec:
    """A job with an evaluation."""
    text = tmp_path / "held_out.txt"
    text.write_text("Nothing of this stands in the other text, as far as anybody knows. " * 20)
    section = {"path": str(text), "window": 32, "max_windows": 4}
    return load_job(make_job(make_model(num_hidden_layers=2), evaluation=section))


@contextmanager
def opened(job: JobSpec, folder: RunFolder) -> Iterator[Context]:
    """A context over a folder that is open."""
    checkpoint = open_checkpoint(Path(job.model.path))
    plan = first_plan(job, checkpoint)
    with make_executor(job, folder.path, lambda _: plan.memory) as executor:
        yield Context(job, checkpoint, plan, folder, executor, quiet)


def test_a_perplexity_in_another_type_is_not_taken_over(evaluated: JobSpec, tmp_path: Path) -> None:
    run_job(evaluated, tmp_path / "run", quiet)
    narrow = evaluated.model_copy(
        update={"model": evaluated.model.model_copy(update={"dtype": "bfloat16"})}
    )
    exported = read_manifest(model_folder(tmp_path / "run"))
    assert exported is not None
    found: dict[str, Any] = {}
    with RunFolder(tmp_path / "run", evaluated) as folder:
        for name, job in (("as it was", evaluated), ("narrow", narrow)):
            with opened(evaluated, folder) as context:
                _, tokens = texts.tokenize(context)
            with opened(job, folder) as context:
                found[name] = evaluation.evaluate(context, exported, None, tokens)
    assert found["as it was"]["before"]["perplexity"] != found["narrow"]["before"]["perplexity"]


def test_an_unfinished_export_leaves_nothing_behind(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, model = load_job(make_job(make_model(num_hidden_layers=2))), tmp_path / "run" / "model"
    run_job(job, tmp_path / "run", quiet)
    expected = folder_bytes(model)
    (model / MANIFEST_NAME).unlink()
    (model / "model-00009-of-00009.safetensors").write_bytes(b"of another number of layers")
    (model / "modeling_other.py").write_text("of an earlier attempt")
    run_job(job, tmp_path / "run", quiet)
    assert folder_bytes(model) == expected
