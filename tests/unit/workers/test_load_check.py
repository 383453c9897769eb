"""The load gate: what it refuses, and that no code of a folder is ever run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from rayprune.specs.errors import VerificationError
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.sized_layers import MODULE
from rayprune.workers.network.building import built_from
from rayprune.workers.network.load_check import check_loads, loaded
from rayprune.workers.store.files import Task, commit, read_manifest
from tests.conftest import MakeJob, MakeModel, edit_json, seal_report

SPREAD = [{"heads": 1, "neurons": 48}, {"heads": 2, "neurons": 20}, {"heads": 0, "neurons": 48}]


def parameters_of(model: Any) -> int:
    """Parameters of a loaded model."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def uneven(make_model: MakeModel) -> tuple[Path, int]:
    """A folder whose layers differ in size, as an export writes it, and its parameters."""
    folder = make_model()
    written = open_checkpoint(folder).written(range(3), SPREAD, "transformers", "float32")
    (folder / "config.json").write_text(json.dumps(written.config))
    assert written.code is not None
    model = built_from(written.code)._from_config(AutoConfig.from_pretrained(folder))
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / f"{MODULE}.py").write_text(written.code.text)
    return folder, parameters_of(model)


def test_layers_of_different_sizes_load_as_a_user_loads_them(uneven: tuple[Path, int]) -> None:
    folder, parameters = uneven
    check_loads(folder, parameters)
    as_user = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert parameters_of(as_user) == parameters


def foreign_text(folder: Path, code: str) -> None:
    """Code of somebody else's in the file that is ours by name."""
    with (folder / f"{MODULE}.py").open("a") as file:
        file.write(code)


def foreign_file(folder: Path, code: str) -> None:
    """Code of somebody else's in a file of its own, that the config names instead of ours."""
    (folder / "modeling_other.py").write_text((folder / f"{MODULE}.py").read_text() + code)
    edit_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_other.PerLayerForCausalLM"},
    )


def foreign_config(folder: Path, code: str) -> None:
    """Code of somebody else's beside ours, for the config's class."""
    (folder / "configuration_other.py").write_text(code)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    other = {"AutoConfig": "configuration_other.OtherConfig"}
    edit_json(folder / "config.json", auto_map=auto_map | other)


@pytest.mark.parametrize("tamper", [foreign_text, foreign_file, foreign_config])
def test_code_that_is_not_ours_is_refused_and_never_run(
    tamper: Callable[[Path, str], None], uneven: tuple[Path, int], tmp_path: Path
) -> None:
    folder, parameters = uneven
    marker = tmp_path / "marker"
    tamper(folder, f"\nopen({str(marker)!r}, 'w').close()\n")
    with pytest.raises(VerificationError, match="nothing of it was run"):
        check_loads(folder, parameters)
    assert not marker.exists()


def test_what_others_name_as_code_is_left_aside(make_model: MakeModel) -> None:
    """Stock types are published with code for older versions: their stock class is what loads."""
    folder = make_model("phi3")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    assert loaded(folder, torch.float32).config.model_type == "phi3"


def test_custom_generation_code_is_never_run(uneven: tuple[Path, int], tmp_path: Path) -> None:
    folder, parameters = uneven
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\ndef generate(model): ..."
    )
    check_loads(folder, parameters)
    assert not (tmp_path / "marker").exists()


def test_verify_of_somebody_elses_run_runs_no_code(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All records of the folder agree: whoever wrote the code wrote them too."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    job = make_job(make_model(num_hidden_layers=1))
    assert main(["run", str(job), "--out", str(run)]) == 0
    model, code = run / "model", run / "model" / f"{MODULE}.py"
    code.write_text(f"open({str(marker)!r}, 'w').close()\n")
    edit_json(
        model / "config.json", auto_map={"AutoModelForCausalLM": f"{MODULE}.PerLayerForCausalLM"}
    )
    done = read_manifest(model)
    assert done is not None
    task = Task(done.task, model, done.made_from)
    commit(task, [*done.files, code.name], done.info)
    seal_report(run)
    capsys.readouterr()
    assert main(["verify", str(run)]) == 5
    assert str(code) in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("name", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_tensors_that_do_not_fit_the_config_are_refused(name: str, make_model: MakeModel) -> None:
    """The number of parameters is right every time: transformers makes up what is missing."""
    folder = make_model()
    parameters = parameters_of(AutoModelForCausalLM.from_pretrained(folder))
    check_loads(folder, parameters)
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    match name:
        case "missing_keys":
            del tensors[up]
        case "unexpected_keys":
            tensors["model.layers.1.mlp.side_proj.weight"] = torch.zeros(2, 2)
        case "mismatched_keys":
            tensors[up] = tensors[up].T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"_proj|mismatched"):
        check_loads(folder, parameters)


def test_another_number_of_parameters_is_refused(make_model: MakeModel) -> None:
    folder = make_model()
    parameters = parameters_of(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(VerificationError, match=f"holds {parameters} parameters"):
        check_loads(folder, parameters - 1)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("float16", "set export.dtype: bfloat16 or float32"),
        ("float32", "are too large, or damaged"),
    ],
)
def test_logits_that_are_not_finite_are_refused(
    dtype: str, remedy: str, make_model: MakeModel
) -> None:
    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    typed = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(typed, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype=dtype)
    parameters = parameters_of(AutoModelForCausalLM.from_pretrained(folder))
    with pytest.raises(VerificationError, match=f"not finite in {dtype}; .*{remedy}"):
        check_loads(folder, parameters)


def test_a_machine_without_memory_is_not_taken_for_a_bad_folder(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(2**50)
    )
    with pytest.raises(RuntimeError, match="allocate memory"):
        check_loads(make_model(), 1)
