"""`rayprune submit` against a real head node of its own: end to end, exit codes, a killed driver,
lost paths, waiting for nodes.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.faults.conftest import Record
from tests.faults.reliability import Row

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason='needs Ray\'s dashboard: pip install "rayprune[cluster]"',
    ),
]
ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A running head node: its dashboard, and the environment of those who may talk to it."""

    address: str
    environment: dict[str, str]

    def rayprune(self, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """Run our command line as a user would, on another machine."""
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd="/",
        )

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "rayprune.orchestrator.cli", *words]

    def submit(self, job: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return self.rayprune(
            "submit", str(job), "--out", str(out), "--address", self.address, *words
        )


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node with ports, a folder and a token of its own, killed with all its processes in the
    end.
    """
    home = tmp_path_factory.mktemp("home")
    script = home / "rayprune"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m rayprune.orchestrator.cli "$@"\n')
    script.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")
    environment = kept | {name: os.environ[name] for name in names}
    environment |= {
        "PATH": f"{home}:{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
    }
    gcs, dashboard, agent, client = free_ports(4)
    start = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        "--num-cpus=3",
    ]
    start += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
    ]
    start += [
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        "--object-store-memory=100000000",
    ]
    with (home / "head.log").open("w") as log:
        # Ray's sockets lie in this folder, and the name of a socket is at most 107 bytes long.
        folder = subprocess.run(
            ["mktemp", "-d", "/tmp/rp-XXXXXX"], capture_output=True, text=True, check=True
        ).stdout.strip()
        head = subprocess.Popen(
            [*start, f"--temp-dir={folder}"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", dashboard)):
                assert head.poll() is None, (home / "head.log").read_text()
                assert time.monotonic() < deadline, (home / "head.log").read_text()
                time.sleep(0.2)
            yield Cluster(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            end(folder, head)


def end(folder: str, head: subprocess.Popen[bytes]) -> None:
    """Kill every process of this head: its daemons name its folder, its workers go with their
    daemon.
    """
    os.killpg(head.pid, signal.SIGKILL)
    head.wait(20)
    for process in processes(folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    subprocess.run(["rm", "-rf", folder], check=True)


def processes(*words: str) -> list[int]:
    """Ids of the processes whose command line holds all these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(word in command for word in words) and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def events(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_end_to_end(
    cluster: Cluster, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job, out = (
        make_job(
            make_model(), budget={"kv_groups": 1}, cluster={"executor": "ray", "address": "local"}
        ),
        tmp_path / "run",
    )
    start = time.monotonic()
    done = cluster.submit(job, out, "--set", "parallel.workers=2")
    print(f"{time.monotonic() - start:.1f} s from submit to finish")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted rayprune-run-" in done.stdout
    assert "stage-finished stage=export" in done.stdout
    assert "calibration:" not in done.stdout, "Ray's echo of the command is left out"
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert cluster.submit(job, out).returncode == 0, "submitting again is allowed"
    assert (
        main(
            [
                "run",
                str(job),
                "--out",
                str(tmp_path / "calm"),
                "--set",
                "cluster.executor=in-process",
            ]
        )
        == 0
    )
    assert folder_bytes(out / "model") == folder_bytes(tmp_path / "calm" / "model")


def test_the_jobs_own_exit_code(
    cluster: Cluster, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, record: Record
) -> None:
    record(
        Row(
            "cluster",
            "submit",
            "four workers on three CPUs; damaged weights",
            "exit codes 4 and 3",
            "refused",
            2,
        )
    )
    model = make_model()
    job = make_job(model, cluster={"executor": "ray"})
    too_many = cluster.submit(job, tmp_path / "four", "--set", "parallel.workers=4")
    assert too_many.returncode == 4
    assert "4 workers need 4 CPUs, the cluster has 3 CPUs" in too_many.stdout
    (model / "model.safetensors").write_bytes(b"damaged")
    damaged = cluster.submit(job, tmp_path / "three")
    assert damaged.returncode == 3
    assert "not a whole safetensors file" in damaged.stdout


def test_killed_driver_goes_on_when_submitted_again(
    cluster: Cluster, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, record: Record
) -> None:
    record(
        Row(
            "cluster",
            "submit",
            "the driver is killed (SIGKILL)",
            "exit code 4",
            "goes on when submitted again",
            1,
            True,
        )
    )
    job = make_job(
        make_model(num_hidden_layers=40),
        memory={"checkpoint_layers": 3},
        budget={"kv_groups": 1},
        cluster={"executor": "ray"},
    )
    out = tmp_path / "run"
    words = cluster.command("submit", str(job), "--out", str(out), "--address", cluster.address)
    client = subprocess.Popen(
        words,
        env=cluster.environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    deadline = time.monotonic() + 90
    while not (out / "tasks" / "layer-0005" / "manifest.json").exists():
        assert time.monotonic() < deadline
        assert client.poll() is None
        time.sleep(0.01)
    (driver,) = processes("rayprune.orchestrator.cli", "/dev/stdin", str(out))
    os.kill(driver, signal.SIGKILL)
    _, complaint = client.communicate(timeout=60)
    assert client.returncode == 4
    assert "the driver was lost" in complaint
    assert "submit it again" in complaint
    done = {path.parent.name for path in (out / "tasks").glob("layer-*/manifest.json")}
    assert 6 <= len(done) < 40
    again = cluster.submit(job, out)
    assert again.returncode == 0, again.stdout + again.stderr
    seen = events(out)
    restart = max(number for number, event in enumerate(seen) if event["event"] == "run-started")
    repeated = {
        f"layer-{event['layer']:04d}"
        for event in seen[restart:]
        if event["event"] == "step-finished" and "seconds" in event
    }
    assert not repeated & done
    assert (
        main(
            [
                "run",
                str(job),
                "--out",
                str(tmp_path / "calm"),
                "--set",
                "cluster.executor=in-process",
            ]
        )
        == 0
    )
    assert folder_bytes(out / "model") == folder_bytes(tmp_path / "calm" / "model")


@pytest.mark.parametrize("interrupting", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_client_leaves_the_job_alone(
    interrupting: signal.Signals,
    cluster: Cluster,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    record: Record,
) -> None:
    what = f"the client gets {interrupting.name}"
    record(Row("cluster", "submit", what, "exit code 130", "the job goes on"))
    job, out = (
        make_job(make_model(), cluster={"executor": "ray"}, budget={"kv_groups": 1}),
        tmp_path / "run",
    )
    words = cluster.command("submit", str(job), "--out", str(out), "--address", cluster.address)
    client = subprocess.Popen(
        words,
        env=cluster.environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        # tests run in the background inherit that SIGINT is ignored
        preexec_fn=lambda: signal.signal(interrupting, signal.SIG_DFL),
    )
    assert client.stdout is not None
    assert "submitted rayprune-run-" in client.stdout.readline()
    client.send_signal(interrupting)
    _, complaint = client.communicate(timeout=30)
    assert client.returncode == 130
    assert "goes on without this terminal" in complaint
    assert f"ray job stop --address {cluster.address} rayprune-run-" in complaint
    deadline = time.monotonic() + 90
    while not (out / "report.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_stopped_job(
    cluster: Cluster, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, record: Record
) -> None:
    """`--no-wait` says how to stop a job; stopping is quick and leaves a run that can go on."""
    record(
        Row("cluster", "submit", "`ray job stop`", "the driver ends within 20 s", "goes on later")
    )
    job, out = (
        make_job(
            make_model(num_hidden_layers=40), cluster={"executor": "ray"}, budget={"kv_groups": 1}
        ),
        tmp_path / "run",
    )
    sent = cluster.submit(job, out, "--no-wait")
    assert sent.returncode == 0
    submission = sent.stdout.split()[1]
    deadline = time.monotonic() + 90
    while not (out / "tasks" / "layer-0001" / "manifest.json").exists():
        assert time.monotonic() < deadline, sent.stdout
        time.sleep(0.01)
    stop = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "stop",
        "--address",
        cluster.address,
        submission,
    ]
    assert (
        subprocess.run(stop, env=cluster.environment, capture_output=True, timeout=60).returncode
        == 0
    )
    deadline = time.monotonic() + 20  # Ray does not wait for what it has killed to be gone
    while processes("rayprune.orchestrator.cli", "/dev/stdin", str(out)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (out / "report.json").exists()


def test_lost_paths_are_refused_inside_a_job(
    cluster: Cluster, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, record: Record
) -> None:
    """A job that Ray's own client submits with its folder: what it names by relative paths would be
    lost.
    """
    record(
        Row(
            "cluster",
            "submit",
            "paths that the cluster would throw away",
            "exit code 2",
            "refused",
            2,
        )
    )
    folder = tmp_path / "sent"
    folder.mkdir()
    job = make_job(make_model(), cluster={"executor": "in-process"})
    (folder / "job.yaml").write_text(job.read_text().replace(str(tmp_path / "dense"), "dense"))
    ray_submit = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "submit",
        "--address",
        cluster.address,
        "--working-dir",
        str(folder),
    ]
    for out, words in (("run", "--out run: is relative"), (str(tmp_path / "run"), "model.path /")):
        sent = subprocess.run(
            [*ray_submit, "--", "rayprune", "run", "job.yaml", "--out", out],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert words in sent.stdout + sent.stderr
        assert "thrown away" in sent.stdout + sent.stderr


def test_a_wrong_token(
    cluster: Cluster, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, record: Record
) -> None:
    record(Row("cluster", "submit", "a wrong token", "exit code 4", "refused"))
    wrong = Cluster(cluster.address, cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64})
    refused = wrong.submit(make_job(make_model()), tmp_path / "run")
    assert refused.returncode == 4
    assert "token" in refused.stderr
    assert "Traceback" not in refused.stderr
