"""The same job on real Ray actors: same bytes from every executor and worker count, errors as in
process.
"""

import os
import re
import signal
import socket
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution import ray_executor
from rayprune.orchestrator.execution.ray_executor import RayExecutor
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, ResourceError
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.files import FileRecord
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import quiet, workers_alive

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
TRANSPORTS = ["object-store", "collective"]


@pytest.mark.parametrize(
    ("settings", "counts", "changes", "transports"),
    [
        ({}, [3], {"hidden_size": 1040}, TRANSPORTS),  # three blocks of outputs
        ({"method": {"name": "stat", "factorization": "qr"}}, [2], {}, ["collective"]),
        (
            {
                "calibration": {
                    "samples": 5,
                    "shards": 5,
                    "held_out_shards": 2,
                    "sequence_length": 8,
                }
            },
            [3],
            {},
            ["object-store"],
        ),
    ],
    ids=["gram", "qr", "few-tokens"],
)
def test_same_bytes_from_every_executor(
    settings: dict[str, Any],
    counts: list[int],
    changes: dict[str, Any],
    transports: list[str],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
) -> None:
    calibration = {"samples": 22, "shards": 5, "held_out_shards": 2}
    sections = {"budget": {"kv_groups": 1}, "calibration": calibration} | settings
    job = make_job(make_model(**changes), **sections)
    run_job(load_job(job), tmp_path / "in-process", quiet)
    expected = folder_bytes(tmp_path / "in-process" / "model")
    for workers in counts:
        for transport in transports:
            out = tmp_path / f"{transport}-{workers}"
            parallel = [f"parallel.workers={workers}", f"parallel.transport={transport}"]
            run_job(load_job(job, ["cluster.executor=ray", *parallel]), out, quiet)
            assert folder_bytes(out / "model") == expected


def test_gradients_are_the_same_on_many_workers(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    method = {"name": "stat", "scale": "gradients", "gradient_samples": 7}
    job = make_job(make_model(), budget={"per_layer": True, "round_to": 4}, method=method)
    run_job(load_job(job), tmp_path / "in-process", quiet)
    run_job(load_job(job, ["cluster.executor=ray", "parallel.workers=3"]), tmp_path / "ray", quiet)
    for folder in ("model", "tasks/gradients"):
        assert folder_bytes(tmp_path / "ray" / folder) == folder_bytes(
            tmp_path / "in-process" / folder
        )


def test_steps_are_the_same_on_many_workers(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    method = {"name": "progressive", "steps": 2, "schedule": "linear", "gate": {"samples": 5}}
    job = make_job(make_model(), budget={"kv_groups": 2, "sparsity": 0.3}, method=method)
    one = run_job(load_job(job), tmp_path / "in-process", quiet)
    overrides = ["cluster.executor=ray", "parallel.workers=2"]
    two = run_job(load_job(job, overrides), tmp_path / "ray", quiet)
    for folder in ("model", "tasks/step-01/gate", "tasks/step-02/gate"):
        assert folder_bytes(tmp_path / "ray" / folder) == folder_bytes(
            tmp_path / "in-process" / folder
        )
    assert [step.divergence for step in one.steps] == [step.divergence for step in two.steps]


def test_an_encoder_is_the_same_on_many_workers(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[40_000:])
    evaluation = {"path": str(other), "window": 64, "max_windows": 5}
    budget = {"per_layer": True, "sparsity": 0.4}
    job = make_job(make_model("bert"), budget=budget, evaluation=evaluation)
    reports = [
        run_job(load_job(job), tmp_path / "in-process", quiet),
        run_job(
            load_job(job, ["cluster.executor=ray", "parallel.workers=3"]), tmp_path / "ray", quiet
        ),
    ]
    assert folder_bytes(reports[0].model) == folder_bytes(reports[1].model)
    assert reports[0].embeddings == reports[1].embeddings is not None
    assert reports[0].masked_lm_loss == reports[1].masked_lm_loss is not None


ALONE = {"batch": 4, "learning_rate": 3e-3, "checkpoint_steps": 2}


@pytest.mark.parametrize(
    ("stage", "workers", "sections"),
    [
        (
            "regularise",
            2,
            {"method": {"name": "dress", "scope": "layer", "mask": "stat", "training": ALONE}},
        ),
        ("recover", 2, {"recover": {"scope": "layer", **ALONE}}),
        ("recover", 4, {"recover": {"scope": "layer", **ALONE}}),
    ],
)
def test_layers_trained_alone_are_the_same_on_many_workers_and_after_a_killed_one(
    stage: str,
    workers: int,
    sections: dict[str, Any],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
) -> None:
    # whoever is killed has a layer to do yet
    model = make_model(num_hidden_layers=max(4, 2 * workers))
    job = make_job(model, budget={"kv_groups": 1}, **sections)
    run_job(load_job(job), tmp_path / "in-process", quiet)
    events: list[dict[str, Any]] = []

    def kill_after_layer_1(event: dict[str, Any]) -> None:
        events.append(event)
        ended = (
            event["event"] == "step-finished" and event["stage"] == stage and event["layer"] == 1
        )
        if ended and not any(e["event"] == "worker-failed" for e in events):
            os.kill(workers_alive()[0], signal.SIGKILL)

    run_job(
        load_job(job, ["cluster.executor=ray", f"parallel.workers={workers}"]),
        tmp_path / "ray",
        kill_after_layer_1,
    )
    assert any(e["event"] == "worker-failed" for e in events)
    for folder in ("model", f"tasks/{stage}/model"):
        assert folder_bytes(tmp_path / "ray" / folder) == folder_bytes(
            tmp_path / "in-process" / folder
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_killed_worker_is_replaced(
    transport: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """SIGKILL in mid-sweep: the driver starts another worker, repeats no finished layer, and the
    bytes are the same.
    """
    job = make_job(
        make_model(num_hidden_layers=6),
        budget={"kv_groups": 1},
        memory={"checkpoint_layers": 2},
        parallel={"workers": 2},
    )
    run_job(load_job(job), tmp_path / "calm", quiet)
    events: list[dict[str, Any]] = []

    def kill_after_layer_3(event: dict[str, Any]) -> None:
        events.append(event)
        if (
            event["event"] == "step-finished"
            and event.get("layer") == 3
            and not any(e["event"] == "worker-failed" for e in events)
        ):
            os.kill(workers_alive()[0], signal.SIGKILL)

    on_ray = ["cluster.executor=ray", f"parallel.transport={transport}"]
    run_job(load_job(job, on_ray), tmp_path / "killed", kill_after_layer_3)
    assert [event["task"] for event in events if event["event"] == "worker-failed"] == [
        "layer-0004"
    ]
    assert [
        event["layer"]
        for event in events
        if event["event"] == "step-finished" and event["stage"] == "sweep"
    ] == list(range(6))
    assert folder_bytes(tmp_path / "killed" / "model") == folder_bytes(tmp_path / "calm" / "model")


def test_a_worker_that_is_lost_while_statistics_are_exchanged(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stands still before the exchange, so that the other waits for it, and is then killed."""
    job = make_job(make_model(), budget={"kv_groups": 1}, parallel={"workers": 2})
    run_job(load_job(job), tmp_path / "calm", quiet)
    submit, stopped = RayExecutor._submit, list[int]()

    def stopping(self: RayExecutor, worker: int, step: str, *args: Any) -> Any:
        if step == "begin_share" and not stopped:
            stopped.append(workers_alive()[0])
            os.kill(stopped[0], signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (stopped[0], signal.SIGKILL)).start()
        return submit(self, worker, step, *args)

    monkeypatch.setattr(RayExecutor, "_submit", stopping)
    failed: list[str] = []
    run_job(
        load_job(job, ["cluster.executor=ray", "parallel.transport=collective"]),
        tmp_path / "killed",
        lambda event: failed.append(event["task"]) if event["event"] == "worker-failed" else None,
    )
    assert failed == ["layer-0000"]
    assert folder_bytes(tmp_path / "killed" / "model") == folder_bytes(tmp_path / "calm" / "model")


@pytest.mark.timeout(300)
def test_a_search_ends_the_same_with_any_number_of_workers(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """One worker, three, and two of which one is killed between two generations."""
    search = {"name": "search", "generations": 3, "offspring": 5, "samples": 5, "levels": 6}
    job = make_job(
        make_model(num_hidden_layers=6), budget={"per_layer": True, "allocation": search}
    )
    run_job(load_job(job), tmp_path / "in-process", quiet)
    expected = folder_bytes(tmp_path / "in-process" / "model")
    run_job(
        load_job(job, ["cluster.executor=ray", "parallel.workers=3"]), tmp_path / "ray-3", quiet
    )
    assert folder_bytes(tmp_path / "ray-3" / "model") == expected
    failed = []

    def kill_after_generation_0(event: dict[str, Any]) -> None:
        if event["event"] == "worker-failed":
            failed.append(event["task"])
        if event["event"] == "step-finished" and event.get("generation") == 0 and not failed:
            os.kill(workers_alive()[0], signal.SIGKILL)

    run_job(
        load_job(job, ["cluster.executor=ray", "parallel.workers=2"]),
        tmp_path / "killed",
        kill_after_generation_0,
    )
    assert failed == ["generation-0001"]
    assert folder_bytes(tmp_path / "killed" / "model") == expected


@pytest.mark.timeout(600)
def test_a_gang_of_ranks_trains_between_the_steps_of_workers(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    """The workers are its ranks, before the cut and behind it, and between the two a group of
    another kind; they judge what they have trained.
    """
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(text_file.read_text()[50_000:55_000])
    job = make_job(
        make_model(),
        method={"name": "dress", "training": {"batch": 4, "learning_rate": 1e-3}},
        recover={"batch": 4, "learning_rate": 1e-3},
        evaluation={"path": str(held_out), "window": 32, "max_windows": 4},
    )
    recovered = []
    for executor in ("in-process", "ray"):
        overrides = [f"cluster.executor={executor}", "parallel.workers=2"]
        overrides += ["parallel.transport=collective"] * (executor == "ray")
        report = run_job(load_job(job, overrides), tmp_path / executor, quiet)
        assert report.perplexity is not None
        recovered.append(report.perplexity.recovered)
    assert recovered[1] == pytest.approx(recovered[0], rel=1e-3)
    assert recovered[0] != report.perplexity.after


def test_all_workers_are_asked_at_once_which_of_them_is_lost(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are busy, as far as can be seen, and one is dead: how long it may take is that of one."""
    job = make_job(make_model(), cluster={"executor": "ray"}, parallel={"workers": 3})
    waits: list[float] = []

    def counted(function: Any) -> Any:
        def call(*arguments: Any, timeout: float | None = None, **options: Any) -> Any:
            waits.append(timeout or 0.0)
            return function(*arguments, timeout=timeout, **options)

        return call

    with RayExecutor(load_job(job), tmp_path, lambda _: MemoryPlan()) as executor:
        executor.start()
        (dead, *busy) = workers_alive()
        monkeypatch.setattr(ray_executor, "PING_SECONDS", 5.0)
        for process in busy:
            os.kill(process, signal.SIGSTOP)
        os.kill(dead, signal.SIGKILL)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(ray, "wait", counted(ray.wait))
                patch.setattr(ray, "get", counted(ray.get))
                patch.setattr(executor, "_ready", lambda actors: None)
                lost = executor.replace_lost()
        finally:
            for process in busy:
                os.kill(process, signal.SIGCONT)
        executor.wait([executor.on(worker).check_head() for worker in range(3)])
    assert len(lost) == 1
    assert sum(waits) <= 5.0


def test_the_workers_of_a_run_that_ended_well_are_those_of_the_next_one(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model(), cluster={"executor": "ray"})

    def workers(*overrides: str, error: type[Exception] | None = None) -> set[int]:
        with suppress(ValueError), RayExecutor(load_job(job, overrides), tmp_path, none) as found:
            found.start()
            found.wait([found.on(n).check_head() for n in range(found.num_workers)])
            ask = [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in found._actors]
            processes = {*ray.get(ask)}
            if error:
                raise error
        return processes

    def none(_: str) -> MemoryPlan:
        return MemoryPlan()

    two = workers("parallel.workers=2")
    assert workers("parallel.workers=2") == two
    assert workers("parallel.workers=1") < two
    assert not workers("parallel.threads_per_worker=2") & two
    failed = workers(error=ValueError)
    assert not workers() & failed


def test_a_steps_own_error_is_not_retried(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    dense = make_model()
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    events: list[dict[str, Any]] = []
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        run_job(
            load_job(make_job(dense, cluster={"executor": "ray"}, budget={"kv_groups": 2})),
            tmp_path / "run",
            events.append,
        )
    assert not any(event["event"] == "worker-failed" for event in events)


def test_a_worker_that_does_not_see_the_run_folder(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """The worker's error reaches the driver as it is: its node, the path, what to do."""
    executor = RayExecutor(
        load_job(make_job(make_model(), cluster={"executor": "ray"})),
        tmp_path,
        lambda _: MemoryPlan(),
    )
    missing = {str(tmp_path / "elsewhere" / "marker"): FileRecord(32, "00")}
    with (
        executor,
        pytest.raises(
            ResourceError,
            match=rf"node {socket.gethostname()}.*elsewhere/marker.*mount the storage",
        ),
    ):
        executor.wait([executor.on(0).check_storage(missing)])


def test_missing_gpus_are_refused_before_any_work(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ray.get_runtime_context().gcs_address
    here = "parallel.device: cuda, but torch finds no GPU here"
    there = "3 workers need 3 CPUs and 3 GPUs, the cluster has 8 CPUs and 0 GPUs"
    for cluster, words in (({"address": "local"}, here), ({"address": address}, there)):
        job = make_job(
            make_model(),
            cluster={"executor": "ray", **cluster},
            parallel={"device": "cuda", "workers": 3},
        )
        assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 4
        assert words in capsys.readouterr().err


def test_prometheus_sees_how_far_a_run_is(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model(), cluster={"executor": "ray"})
    run_job(load_job(job), tmp_path / "seen", quiet)
    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = r'rayprune_steps_done\{.*run="seen",stage="sweep"\} 3\.0'
    deadline, told = time.monotonic() + 60, ""
    while not re.search(wanted, told) and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(page, timeout=10) as answer:
            told = answer.read().decode()
    assert re.search(wanted, told)
    assert re.search(r'rayprune_peak_memory_bytes\{.*process="worker-0",run="seen"\}', told)
