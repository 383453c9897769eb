"""`rayprune init`: for every family and machine a job that loads and fits, with reasons."""

import json
from itertools import cycle
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.planning import preflight
from rayprune.orchestrator.planning.preflight import first_plan
from rayprune.orchestrator.planning.proposal import propose
from rayprune.orchestrator.reporting.job_file import job_text, taken
from rayprune.specs.errors import ResourceError, SpecError
from rayprune.specs.loader import load_job
from rayprune.specs.machine import load_profile
from rayprune.specs.recipe import RECIPES, RecipeName
from rayprune.workers.machine.host import Gpu, Host
from rayprune.workers.model.checkpoint import planned_checkpoint
from tests.conftest import MakeModel
from tests.models import raw_config

GIB = 2**30
HOSTS = {
    "no GPU": Host(16, 64 * GIB),
    "8 GiB": Host(4, 8 * GIB),
    "no bfloat16": Host(8, 32 * GIB, bfloat16_pace=9.0),
    "8 x H100": Host(128, 1024 * GIB, (Gpu("NVIDIA H100 80GB HBM3", 79 * GIB),) * 8),
}
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "gpt2",
    "mixtral",
    "bert",
    "bloom",
)
AIMS = cycle(RECIPES)
CASES = [(family, host, next(AIMS)) for family in FAMILIES for host in HOSTS]


def config_folder(folder: Path, family: str) -> Path:
    raw = raw_config(family, intermediate_size=768, hidden_size=128, head_dim=32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(("family", "host", "aim"), CASES)
def test_a_job_that_fits(family: str, host: str, aim: RecipeName, tmp_path: Path) -> None:
    model = planned_checkpoint(config_folder(tmp_path / "model", family))
    proposal = propose(str(model.path), model, HOSTS[host], aim)
    file = tmp_path / "job.yaml"
    file.write_text(job_text(proposal, file))
    job = load_job(file)
    assert job.recipe == aim
    assert job.parallel.device == ("cuda" if HOSTS[host].gpus else "cpu")
    assert "bfloat16" not in job.dtypes.values() or host != "no bfloat16"
    plan = first_plan(job, model)
    assert plan.tokens_per_neuron >= 10
    assert job.memory.worker
    assert plan.needs.worker_memory_bytes <= job.memory.worker
    whole = job.memory.worker * (1 if HOSTS[host].gpus else job.parallel.workers)
    assert whole <= (79 * GIB if HOSTS[host].gpus else HOSTS[host].memory_bytes)


def test_packages_that_a_run_will_miss_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planned_checkpoint(config_folder(tmp_path / "model", "llama"))
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    told = {
        aim: "\n".join(taken(propose("m", model, HOSTS["no GPU"], aim), Path("job.yaml")))
        for aim in RECIPES
    }
    assert "rayprune[train]" in told["best"]
    assert "rayprune[gguf]" in told["serving"]
    assert "before a run" not in told["fast"]


def test_a_type_that_the_cores_are_slow_in_is_given_up_with_the_reason(tmp_path: Path) -> None:
    model = planned_checkpoint(config_folder(tmp_path / "model", "llama"))
    asked = {"calibration.own.dtype", "recover.dtype"}
    for host, dtype in (("no GPU", "bfloat16"), ("no bfloat16", "float32")):
        proposal = propose("m", model, HOSTS[host], "best")
        assert {name for name, taken in proposal.job.dtypes.items() if taken == dtype} == asked
    told = "\n".join(taken(proposal, Path("job.yaml")))
    assert "recover: {dtype: float32} (bfloat16 would take 9 times as long on this mac" in told


def test_what_a_family_does_not_allow_is_given_up_with_the_reason(tmp_path: Path) -> None:
    model = planned_checkpoint(config_folder(tmp_path / "model", "mixtral"))
    text = job_text(propose("m", model, HOSTS["no GPU"], "balanced"), tmp_path / "job.yaml")
    assert "per_layer" not in text  # the recipe's
    assert "  drift: 0.0 # set it to 0: it is not done with mixtures of experts" in text
    told = list(taken(propose("m", model, HOSTS["no GPU"], "balanced"), Path("job.yaml")))
    assert [line for line in told if "recipe has it: correction.drift: 0.0 (set it to" in line]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["h100-80gb", "cpu-core"])
def test_a_job_for_another_machine(
    name: str, workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = config_folder(tmp_path / "model", "llama"), tmp_path / "job.yaml"
    words = ["init", str(folder), "--profile", name, "--out", str(file)]
    assert main([*words, "--workers", str(workers)]) == 0
    assert f"on {name}, beside the start" in capsys.readouterr().out
    job = load_job(file)
    assert job.parallel.device == ("cuda" if name == "h100-80gb" else "cpu")
    assert job.parallel.workers == workers
    assert f"; {workers} x {name}" in file.read_text()
    size = load_profile(name).memory_bytes
    assert job.memory.worker
    assert job.memory.worker <= size
    assert job.parallel.threads_per_worker == 1
    file.unlink()
    assert main([*words, "--profile", "no such"]) == 2
    assert main(["init", str(folder), "--workers", "2", "--out", str(file)]) == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_machine_that_is_too_small_is_refused(family: str, tmp_path: Path) -> None:
    model = planned_checkpoint(config_folder(tmp_path / "model", family))
    with pytest.raises(ResourceError, match=r"memory\.worker: a worker needs at least"):
        propose("m", model, Host(2, 2**20), "best")
    with pytest.raises(SpecError, match=r"budget\.sparsity"):
        propose("m", model, HOSTS["no GPU"], "fast", sparsity=1.5)


def test_the_command_writes_a_valid_job(
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(intermediate_size=128)
    Path("text.txt").write_text("All that a model reads, and much more than that. " * 60)
    Path("jobs").mkdir()
    words = ["init", "dense", "--text", "text.txt", "--out"]
    assert main([*words, "unmeasured.yaml"]) == 0
    assert "measures no quality: --held-out FILE" in capsys.readouterr().out
    Path("held_out.txt").write_text("What is only measured on is another text than that. " * 10)
    assert main([*words, "same.yaml", "--held-out", "text.txt"]) == 2
    assert "evaluate on other text" in capsys.readouterr().err
    words += ["jobs/job.yaml", "--held-out", "held_out.txt"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "wrote jobs/job.yaml: recipe fast" in told
    assert "measures no quality" not in told
    text = Path("jobs/job.yaml").read_text()
    assert "  path: ../held_out.txt # of the dense and the pruned model\n" in text
    assert "  window: 256 # tokens\n" in text
    assert "  path: ../dense\n" in text
    schema = text.splitlines()[0].partition("$schema=")[2]
    assert json.loads(Path(schema).read_text())["$id"] == "urn:rayprune:job:1"
    assert main(["validate", "jobs/job.yaml"]) == 0
    assert "all that the text has" in text
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
