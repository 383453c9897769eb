"""A run is planned for the workers that it really has: how many, and where they compute."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rayprune.orchestrator.execution.executor import InProcessExecutor, chosen_device
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.planning.preflight import first_plan
from rayprune.orchestrator.run import plan_on, run_job
from rayprune.specs.errors import ResourceError
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.numerics.linalg import kernels
from rayprune.workers.workbench import Workbench
from tests.conftest import MakeJob, MakeModel

MIB = 2**20


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "num_workers", "expected"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 3, 4, "cpu"),
        ("auto", 4, 4, "cuda"),
        ("cuda", 0, 4, "cuda"),
        ("cpu", 8, 1, "cpu"),
    ],
)
def test_auto_takes_the_gpus_if_there_is_one_for_each_worker(
    wanted: str, num_gpus: int, num_workers: int, expected: str
) -> None:
    assert chosen_device(wanted, num_gpus, num_workers) == expected


LARGE = {"samples": 128, "sequence_length": 64}


def test_auto_is_planned_for_the_device_that_the_workers_have(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """On a CPU, where weights are converted, statistics of 4096 columns have to go into files."""
    model = make_model(num_hidden_layers=1, intermediate_size=4096)
    job = load_job(
        make_job(
            model,
            budget={"kv_groups": 2},
            parallel={"device": "auto"},
            memory={"worker": "740MiB"},
            calibration=LARGE,
        )
    )
    checkpoint = open_checkpoint(model)
    on_cpu = first_plan(job, checkpoint)
    assert (on_cpu.device, on_cpu.memory.spill_statistics) == ("cpu", True)
    plans = {"cpu": on_cpu}
    assert plan_on("cpu", plans, job, checkpoint) is on_cpu
    on_gpu = plan_on("cuda", plans, job, checkpoint)
    assert (on_gpu.device, on_gpu.memory.spill_statistics) == ("cuda", False)
    assert plan_on("cuda", plans, job, checkpoint) is on_gpu


def test_what_only_a_gpu_can_do_is_refused_once_there_is_none(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """In bf16, as on a GPU, a micro-batch takes half of what it takes on a CPU."""
    model = make_model(num_hidden_layers=1, intermediate_size=1024, dtype=torch.bfloat16)
    job = load_job(
        make_job(
            model,
            budget={"kv_groups": 2},
            parallel={"device": "auto", "micro_batch": 128},
            memory={"worker": "450MiB"},
            calibration=LARGE,
        )
    )
    checkpoint = open_checkpoint(model)
    assert first_plan(job, checkpoint).device == "cuda"
    with pytest.raises(ResourceError, match=r"memory\.worker: a worker needs"):
        make_plan(job, checkpoint, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"memory\.worker: a worker needs"):
            run_job(job, tmp_path / "run", lambda _: None)
    on_cpu = job.parallel.model_copy(update={"device": "cpu"})
    with pytest.raises(ResourceError, match=r"memory\.worker: a worker needs"):
        first_plan(job.model_copy(update={"parallel": on_cpu}), checkpoint)


def test_the_executor_asks_for_the_plan_of_its_device(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    asked = []

    def memory_on(device: str) -> MemoryPlan:
        asked.append(device)
        return MemoryPlan()

    job = load_job(make_job(make_model(), parallel={"device": "auto"}))
    with InProcessExecutor(job, tmp_path, memory_on) as executor:
        executor.start()
    assert asked == ["cuda" if torch.cuda.is_available() else "cpu"]


def test_statistics_lie_where_the_activations_are(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, memory = load_job(make_job(make_model())), MemoryPlan(spill_statistics=True)
    bench = Workbench(job, str(tmp_path), "cpu", memory)
    bench.device = torch.device("meta")  # as any that is not the CPU
    for size in (1, MIB):
        assert bench.scratch.zeros(size, dtype=torch.float32).device == bench.device


def test_a_job_in_one_process_is_planned_for_one_worker(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model()
    plans = {
        workers: make_plan(
            load_job(make_job(model, parallel={"workers": workers})), open_checkpoint(model)
        )
        for workers in (1, 4)
    }
    assert plans[4].needs == plans[1].needs
    assert plans[4].workers == 1
    job = load_job(make_job(model, parallel={"workers": 4}))
    run_job(job, tmp_path / "run", lambda _: None)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["workers"] == 1


@pytest.mark.parametrize(
    ("kind", "own", "fast", "taken"),
    [
        ("cpu", "bfloat16", True, torch.float32),
        ("cuda", "bfloat16", True, torch.bfloat16),
        ("cuda", "bfloat16", False, torch.float32),
        ("cuda", "float16", False, torch.float16),
    ],
)
def test_the_type_is_one_that_the_device_multiplies(
    kind: str, own: str, fast: bool, taken: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: fast)
    checkpoint = SimpleNamespace(model=SimpleNamespace(dtype=own))
    bench = SimpleNamespace(device=torch.device(kind), checkpoint=checkpoint)
    assert Workbench._dtype(bench, "auto") == taken  # type: ignore[arg-type]


def test_kernels_are_for_gpus_that_triton_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert kernels.__wrapped__() is None
