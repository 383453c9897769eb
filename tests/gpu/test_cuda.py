"""The same job on a GPU: the same units stay, the weights agree to rounding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.cli import main
from tests.conftest import MakeJob, MakeModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("method", [{"factorization": "gram"}, {"factorization": "qr"}, {"scale": "gradients"}])
def test_gpu_agrees_with_cpu(method: dict[str, str], make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(make_model(), budget={"kv_groups": 1}, method=method)
    for device in ("cpu", "cuda"):
        assert main(["run", str(job), "--out", str(tmp_path / device), "--set", f"parallel.device={device}"]) == 0
    for layer in range(3):
        folders = [tmp_path / device / "tasks" / f"layer-{layer:04d}" for device in ("cpu", "cuda")]
        kept = [json.loads((folder / "manifest.json").read_text())["info"]["kept"] for folder in folders]
        assert kept[0] == kept[1]
        tensors = [load_file(folder / "layer.safetensors") for folder in folders]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
