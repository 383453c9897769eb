"""Corrections that also make up for the drift from the dense model: same bytes whatever happens,
and less drift.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel, folder_bytes, write_job
from tests.helpers import families, normalised, quiet, some
from tests.models import build_model

WINDOWS_NT = torch.randint(3, 259, (32, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A job over 5 layers with the FFN pruned, 22 windows in 5 shards of uneven size, half of the
    drift made up for.
    """
    calibration, memory = (
        {"samples": 22, "shards": 5, "held_out_shards": 2},
        {"checkpoint_layers": 2},
    )
    folder = tmp_path_factory.mktemp("drift")
    return write_job(
        folder / "job.yaml",
        text_file,
        build_model(folder / "dense", num_hidden_layers=5),
        budget={"kv_groups": 2},
        calibration=calibration,
        memory=memory,
        correction={"drift": 0.5},
    )


@pytest.fixture(scope="module")
def expected(job: Path) -> dict[str, bytes]:
    """The exported folder of an undisturbed in-process run."""
    run_job(load_job(job), job.parent / "expected", quiet)
    return folder_bytes(job.parent / "expected" / "model")


@torch.inference_mode()
def last_hidden(model: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(model)(
        WINDOWS_NT, output_hidden_states=True
    ).hidden_states[-1]


@pytest.mark.slow
def test_the_pruned_model_stays_closer_to_the_dense_one(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    text = tmp_path / "random.txt"
    # as long as the windows; the tokenizer has one token for a byte
    text.write_bytes(bytes(WINDOWS_NT.flatten() % 96 + 32))
    dense = make_model(num_hidden_layers=4)
    errors = {}
    for drift in (0.0, 0.5, 1.0):
        calibration = {"path": str(text), "samples": 32}
        job = make_job(
            dense,
            budget={"kv_groups": 2, "sparsity": 0.3},
            calibration=calibration,
            correction={"drift": drift},
        )
        report = run_job(load_job(job), tmp_path / f"run-{drift}", quiet)
        errors[drift] = float(
            (last_hidden(tmp_path / f"run-{drift}" / "model") - last_hidden(dense)).norm()
        )
        names = {name for layer in report.layers for name in layer.groups}
        assert names == ({"heads", "neurons"} if drift else {"neurons"}), (
            "blocks that lose nothing make up for drift too"
        )
    assert max(errors[0.5], errors[1.0]) < errors[0.0]


@pytest.mark.parametrize(
    "memory",
    [
        {"keep_inputs": False},
        {"spill_statistics": True, "spill_hidden": True, "keep_inputs": False},
    ],
    ids=str,
)
def test_what_memory_holds_never_changes_the_bytes(
    memory: dict[str, bool], job: Path, expected: Any, tmp_path: Path, force_memory: Any
) -> None:
    force_memory(**memory)
    run_job(load_job(job), tmp_path / "tight", quiet)
    assert folder_bytes(tmp_path / "tight" / "model") == expected


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_restart_has_its_dense_path_again(
    stop_after: int, job: Path, expected: Any, tmp_path: Path
) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step-finished" and event.get("layer") == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(job), tmp_path / "run", stop)
    run_job(load_job(job), tmp_path / "run", quiet)
    assert folder_bytes(tmp_path / "run" / "model") == expected


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_bytes(
    workers: int, job: Path, expected: Any, tmp_path: Path
) -> None:
    run_job(
        load_job(job, ["cluster.executor=ray", f"parallel.workers={workers}"]),
        tmp_path / "ray",
        quiet,
    )
    assert folder_bytes(tmp_path / "ray" / "model") == expected


@pytest.mark.parametrize(
    "model_type", some(["granite", *families(*normalised(), "bloom")], "granite")
)
def test_families(
    model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(model_type)
    heads = open_checkpoint(dense).model.layers[0].group("heads")
    budget = {"kv_groups": heads.num_units // (1 if heads.fixed else 2)}
    job = make_job(dense, budget=budget, correction={"drift": 0.5})
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_refit_makes_up_for_drift_in_its_second_pass(job: Path, tmp_path: Path) -> None:
    settings = ["--set", "parallel.placement=layers", "--set", "parallel.propagation=refit"]
    assert main(["run", str(job), "--out", str(tmp_path / "run"), *settings]) == 0
    layer = json.loads((tmp_path / "run" / "report.json").read_text())["layers"][0]
    assert layer["groups"].keys() == {"heads", "neurons"}


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("llama", ["parallel.placement=layers"], "on the dense path nothing drifts"),
        ("llama", ["correction.drift=1.5"], "must be at most 1"),
        ("llama", ["method.factorization=qr"], "are kept as rows; take more tokens"),
        (
            "llama",
            ["calibration.samples=4", "calibration.sequence_length=8", "calibration.shards=2"],
            "the 32 calibration tokens for 48 columns",
        ),
        ("gemma2", [], "model_type gemma2 does not add its blocks' outputs"),
    ],
)
def test_where_drift_is_not_known_it_is_refused(
    model_type: str,
    settings: list[str],
    words: str,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: Any,
) -> None:
    job = make_job(make_model(model_type), budget={"kv_groups": 2}, correction={"drift": 0.5})
    arguments = [word for setting in settings for word in ("--set", setting)]
    assert main(["run", str(job), "--out", str(tmp_path / "run"), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "tasks").exists()
