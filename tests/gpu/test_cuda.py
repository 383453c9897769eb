"""The same jobs on a GPU: the same units stay, the weights agree to rounding, trainings follow the
same curve.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.reporting.report import read_report
from rayprune.specs.latency import load_latency
from rayprune.workers.store.training_stage import read_log
from rayprune.workers.tools.bench import Conditions, bench
from tests.conftest import MakeJob, MakeModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ALIKE: dict[str, Any] = {"budget": {"kv_groups": 1}}
TRAINING = {"epochs": 2, "batch": 4, "learning_rate": 1e-3, "checkpoint_steps": 3}


def both(job: Path, folder: Path) -> list[Path]:
    """The run folders of a job on the CPU and on the GPU."""
    folders = [folder / device for device in ("cpu", "cuda")]
    for run in folders:
        assert (
            main(["run", str(job), "--out", str(run), "--set", f"parallel.device={run.name}"]) == 0
        )
    return folders


@pytest.mark.parametrize(
    "sections",
    [
        *(
            ALIKE | {"method": method}
            for method in (
                {"factorization": "gram"},
                {"factorization": "qr"},
                {"scale": "gradients"},
            )
        ),
        *(ALIKE | {"method": {"name": name}} for name in ("numerical", "obs", "flap", "wanda")),
        ALIKE | {"correction": {"drift": 0.5}},
        {"parallel": {"placement": "layers"}},
        {"budget": {"per_layer": True, "allocation": "curves"}, "correction": {"drift": 0.5}},
        {"budget": {"per_layer": True, "allocation": "threshold"}, "method": {"name": "numerical"}},
    ],
    ids=str,
)
def test_gpu_agrees_with_cpu(
    sections: dict[str, Any], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    on_cpu, on_gpu = both(make_job(make_model(), **sections), tmp_path)
    for layer in range(3):
        folders = [run / "tasks" / f"layer-{layer:04d}" for run in (on_cpu, on_gpu)]
        kept = [
            json.loads((folder / "manifest.json").read_text())["info"]["kept"] for folder in folders
        ]
        assert kept[0] == kept[1]
        tensors = [load_file(folder / "layer.safetensors") for folder in folders]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_hidden_states_in_files_change_nothing(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, force_memory: Any
) -> None:
    (tmp_path / "other.txt").write_text(
        "Nothing of this stands in the text for calibration, nowhere at all. " * 8
    )
    sections = {
        "budget": {"per_layer": True},
        "evaluation": {"path": str(tmp_path / "other.txt"), "window": 16},
    }
    job = make_job(
        make_model(), **sections, parallel={"device": "cuda", "workers": 1, "micro_batch": 2}
    )
    reports = []
    for name in ("kept", "tight"):
        assert main(["run", str(job), "--out", str(tmp_path / name)]) == 0
        reports.append(read_report(tmp_path / name))
        force_memory(spill_hidden=True, keep_inputs=False)
    assert reports[0].perplexity == reports[1].perplexity


@pytest.mark.parametrize(
    ("task", "sections"),
    [
        ("regularise", ALIKE | {"method": {"name": "dress", "mask": "stat", "training": TRAINING}}),
        (
            "regularised-0001",
            ALIKE | {"method": {"name": "dress", "scope": "layer", "training": TRAINING}},
        ),
        ("gates-0000", {"method": {"name": "trsp", "gates": TRAINING, "training": TRAINING}}),
        (
            "updates",
            {
                "method": {
                    "name": "trsp",
                    "gates": TRAINING,
                    "training": TRAINING,
                    "transfer": "penalty",
                }
            },
        ),
        ("recover", ALIKE | {"recover": TRAINING | {"loss": "distillation", "hidden": 0.1}}),
        ("recover", ALIKE | {"recover": TRAINING | {"lora": {"rank": 4}}}),
    ],
    ids=str,
)
def test_trainings_follow_the_same_curve(
    task: str, sections: dict[str, Any], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    runs = both(make_job(make_model(), **sections), tmp_path)
    on_cpu, on_gpu = ([line["loss"] for line in read_log(run / "tasks" / task)] for run in runs)
    assert on_cpu
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert read_report(runs[1]).peak_memory_bytes["worker-0 GPU"] > 0


def test_layers_and_models_are_timed_there(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    assert main(["latency", str(model), "--tokens", "8", "--device", "cuda"]) == 0
    (tmp_path / "table.yaml").write_text(capsys.readouterr().out)
    table = load_latency(str(tmp_path / "table.yaml"))
    assert (table.device, table.dtype) == ("cuda", "bfloat16")
    assert [one.phase for one in table.passes] == ["prefill", "decode"]
    (found,) = bench([model], Conditions(tokens=8, new=2, rounds=1, device="cuda"))
    assert 4 * found.parameters <= found.peak_memory_bytes < 2**30
    assert found.decode_tokens_per_second > 0
