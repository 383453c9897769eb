"""One Ray cluster of several nodes on this machine, of which workers, nodes and drivers are killed,
stopped and starved; drivers are commands as a user gives them. Every job ends with the same bytes,
or says what it was and goes on later.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import folder_bytes, write_job
from tests.faults.bench import Bench, ended, failures, in_mid_run, log, until, workers
from tests.faults.conftest import Record
from tests.faults.forks import attempt
from tests.faults.reliability import Row
from tests.models import build_model

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]
NODES, LAYERS = 3, 10
HANGS_AFTER = 20
"""Seconds without the end of a step; a step of these jobs takes a moment."""
CHECKS = {f"health_check_{name}": 500 for name in ("initial_delay_ms", "period_ms", "timeout_ms")}
PLACEMENTS = {"shards": "layer-0003", "layers": f"layers 0 to {LAYERS - 1}"}


@pytest.fixture(scope="module")
def benches(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path
) -> Iterator[Callable[[], Bench]]:
    """The cluster of the tests before, or another one where they have left none."""
    folder = tmp_path_factory.mktemp("cluster")
    write_job(
        folder / "job.yaml",
        text_file,
        build_model(folder / "dense", num_hidden_layers=LAYERS),
        budget={"kv_groups": 1},
        parallel={"workers": 2, "micro_batch": 1},
    )
    config = CHECKS | {"health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": config}
    made: list[Bench] = []

    def bench() -> Bench:
        if not made or made[-1].is_gone:
            for gone in made[-1:]:
                gone.cluster.shutdown()
            cluster = Cluster(initialize_head=True, head_node_args=head)
            nodes = [cluster.add_node(num_cpus=1) for _ in range(NODES)]
            made.append(Bench(folder, cluster, nodes))
        return made[-1]

    yield bench
    for last in made[-1:]:
        last.cluster.shutdown()


@pytest.fixture
def bench(benches: Callable[[], Bench]) -> Bench:
    return benches()


@dataclass(frozen=True)
class Fault:
    """What is done in mid-run to a cluster, and what is undone afterwards."""

    name: str
    act: Callable[[Bench], object]
    undo: Callable[[Bench, Any], object] = lambda bench, what: None


def stop(number: int) -> list[int]:
    os.kill(number, signal.SIGSTOP)
    return [number]


def go_on(_: Bench, stopped: list[int]) -> None:
    for number in stopped:
        try:
            os.kill(number, signal.SIGCONT)
        except ProcessLookupError:
            continue


def stop_raylet(bench: Bench) -> list[int]:
    """The daemon of a node hangs: the head takes the node for dead."""
    (raylet,) = bench.nodes[0].all_processes["raylet"]
    return stop(raylet.process.pid)


def after_raylet(bench: Bench, stopped: list[int]) -> None:
    go_on(bench, stopped)
    bench.replace(bench.nodes[0])


LOSSES = [
    Fault("a worker is killed (SIGKILL)", lambda b: os.kill(workers()[0], signal.SIGKILL)),
    Fault("a worker is told to end (SIGTERM)", lambda b: os.kill(workers()[0], signal.SIGTERM)),
    Fault("a worker reads behind the end of a file (SIGBUS)",
          lambda b: os.kill(workers()[0], signal.SIGBUS)),
    Fault("a worker hangs (SIGSTOP)", lambda b: stop(workers()[0]), go_on),
    Fault("a node loses its power, another one comes", lambda b: b.replace(b.nodes[0])),
    Fault("a node's daemon hangs (SIGSTOP)", stop_raylet, after_raylet),
]  # fmt: skip
MET = [
    (fault, placement)
    for number, fault in enumerate(LOSSES)
    for placement in (PLACEMENTS if number == 0 else [list(PLACEMENTS)[number % 2]])
]
"""The first one in both placements, the others in one of them in turn."""


@pytest.mark.parametrize(
    ("fault", "placement"), MET, ids=[f"{fault.name}, {placement}" for fault, placement in MET]
)
def test_a_loss_in_mid_run(
    fault: Fault, placement: str, bench: Bench, tmp_path: Path, record: Record
) -> None:
    out = tmp_path / "run"
    sets = [f"parallel.placement={placement}", f"parallel.step_seconds={HANGS_AFTER}"]
    driver = bench.driver(out, *sets)
    in_mid_run(out, placement, driver)
    what = fault.act(bench)
    try:
        words = ended(driver)
    finally:
        fault.undo(bench, what)
    assert driver.returncode == 0, words
    equal = folder_bytes(out / "model") == bench.of(placement)
    lost = ", ".join(failures(out)) or "nothing"
    seen = "the task is done again" if failures(out) else "not even noticed"
    record(Row("cluster", f"placement: {placement}", fault.name, seen, "ends", 1, equal))
    assert equal
    assert len(failures(out)) <= 1, lost


def test_no_retries(bench: Bench, tmp_path: Path, record: Record) -> None:
    out = tmp_path / "run"
    driver = bench.driver(out, "parallel.retries=0")
    in_mid_run(out, "shards", driver)
    os.kill(workers()[0], signal.SIGKILL)
    words = ended(driver)
    assert driver.returncode == 4, words
    assert "finished tasks are kept" in words
    again = bench.driver(out, "parallel.retries=0")
    words = ended(again)
    assert again.returncode == 0, words
    equal = folder_bytes(out / "model") == bench.of("shards")
    record(Row("cluster", "parallel.retries: 0", "a worker is killed (SIGKILL)", "exit code 4",
               "goes on later", 1, equal))  # fmt: skip
    assert equal


def test_the_driver_is_killed(bench: Bench, tmp_path: Path, record: Record) -> None:
    """Its workers go with it, and the next driver repeats nothing."""
    out = tmp_path / "run"
    driver = bench.driver(out)
    in_mid_run(out, "shards", driver)
    driver.kill()
    driver.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("tasks/*/manifest.json")}
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(), "workers outlive their driver by ten seconds"
    again = bench.driver(out)
    words = ended(again)
    assert again.returncode == 0, words
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    equal = folder_bytes(out / "model") == bench.of("shards")
    record(Row("cluster", "driver", "it is killed (SIGKILL)", "its workers end within 10 s",
               "goes on, nothing done twice", 1, equal))  # fmt: skip
    assert equal


def test_two_drivers(bench: Bench, tmp_path: Path, record: Record) -> None:
    """Two of one folder: the second is refused. One more in its own folder: it waits for no one."""
    first = bench.driver(tmp_path / "run", "parallel.workers=1")
    until((tmp_path / "run" / "plan.json").exists, first, "a plan")
    second = bench.driver(tmp_path / "run", "parallel.workers=1")
    third = bench.driver(tmp_path / "other", "parallel.workers=1")
    words = ended(second)
    assert second.returncode == 2, words
    assert "another run is writing here" in words
    for driver, name in ((first, "run"), (third, "other")):
        words = ended(driver)
        assert driver.returncode == 0, words
        assert folder_bytes(tmp_path / name / "model") == bench.of("shards")
    record(Row("cluster", "driver", "two drivers of one folder", "exit code 2 for the second",
               "the first ends", 1, True))  # fmt: skip
    record(Row("cluster", "driver", "two drivers on one cluster", "both run", "both end", 1, True))


def test_too_few_nodes(bench: Bench, tmp_path: Path, record: Record) -> None:
    """The first run waits a second in vain; the second gets its node while it waits."""
    out, sets = tmp_path / "run", [f"parallel.workers={NODES + 1}"]
    driver = bench.driver(out, *sets, "cluster.wait_seconds=1")
    words = ended(driver)
    assert driver.returncode == 4, words
    assert f"{NODES + 1} workers need {NODES + 1} CPUs, the cluster has {NODES} CPUs" in words
    record(Row("cluster", "nodes", "fewer than workers", "exit code 4", "goes on later", 1))
    driver = bench.driver(out, *sets, "cluster.wait_seconds=60")
    until(lambda: log(out).count("waiting-for-nodes") == 2, driver, "the wait")
    node = bench.cluster.add_node(num_cpus=1)
    words = ended(driver)
    bench.cluster.remove_node(node)
    assert driver.returncode == 0, words
    equal = folder_bytes(out / "model") == bench.of("shards")
    record(Row("cluster", "nodes", "one comes late", "it is waited for", "ends", 1, equal))
    assert equal


FULL = """
import sys, time
import numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
kept = []
try:
    for _ in range(400):
        kept.append(ray.put(numpy.random.rand(2**17)))
except Exception as error:
    print(error)
print("full", flush=True)
time.sleep(300)
"""


def test_the_object_store_is_full(bench: Bench, tmp_path: Path, record: Record) -> None:
    """Another driver holds all of a small node's memory for objects."""
    node = bench.cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    words = [sys.executable, "-c", FULL, bench.cluster.address]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    greedy = subprocess.Popen(words, **pipes)
    try:
        assert greedy.stdout is not None
        while "full" not in (line := greedy.stdout.readline()):
            assert line, "it could not fill the store"
        driver = bench.driver(tmp_path / "run", f"parallel.workers={NODES + 2}",
                              "calibration.shards=8")  # fmt: skip
        said = ended(driver)
    finally:
        greedy.kill()
        bench.cluster.remove_node(node, allow_graceful=False)
    calm = tmp_path / "calm"
    job = str(bench.folder / "job.yaml")
    assert attempt(["run", job, "--out", str(calm), "--set", "calibration.shards=8"]).code == 0
    assert driver.returncode == 0, said
    equal = folder_bytes(tmp_path / "run" / "model") == folder_bytes(calm / "model")
    record(Row("cluster", "nodes", "the object store is full", "Ray spills", "ends", 1, equal))
    assert equal


def silent() -> tuple[socket.socket, str]:
    """Something listens, and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    return server, f"127.0.0.1:{server.getsockname()[1]}"


def closed() -> tuple[socket.socket, str]:
    """Nobody listens."""
    server, address = silent()
    server.close()
    return server, address


@pytest.mark.parametrize(
    ("what", "listen"), [("nobody listens", closed), ("somebody listens and never answers", silent)]
)
def test_a_wrong_address(
    what: str,
    listen: Callable[[], tuple[socket.socket, str]],
    bench: Bench,
    tmp_path: Path,
    record: Record,
) -> None:
    server, address = listen()
    begin = time.monotonic()
    driver = bench.driver(tmp_path / "run", address=address)
    words = ended(driver, 100)
    seconds = time.monotonic() - begin
    server.close()
    record(Row("cluster", "cluster.address", what, "exit code 4 within a minute", "refused"))
    assert driver.returncode == 4, words
    assert "Traceback" not in words
    assert address in words
    assert seconds < 60, seconds


def test_a_head_that_is_gone(bench: Bench, tmp_path: Path, record: Record) -> None:
    """`auto`, with an address that nobody answers at."""
    server, address = closed()
    begin = time.monotonic()
    driver = subprocess.Popen(
        bench.command(tmp_path / "run", address="auto"),
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    words = ended(driver, 100)
    server.close()
    record(Row("cluster", "cluster.address: auto", "RAY_ADDRESS leads nowhere",
               "exit code 4 within a minute", "refused"))  # fmt: skip
    assert driver.returncode == 4, words
    assert "Traceback" not in words
    assert time.monotonic() - begin < 60


BROKEN = "raise RuntimeError('somebody else has put a package here')\n"


def test_a_worker_that_cannot_be_made(bench: Bench, tmp_path: Path, record: Record) -> None:
    """Ray's workers look for packages in the current folder first: the error is shown, at once."""
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").write_text(BROKEN)
    begin = time.monotonic()
    driver = subprocess.Popen(
        [sys.executable, "-P", *bench.command(tmp_path / "run")[1:]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    words = ended(driver, 120)
    record(Row("cluster", "workers", "one cannot be made (a package of the same name)",
               "the error is shown at once", "refused"))  # fmt: skip
    assert driver.returncode != 0, words
    assert "somebody else has put a package here" in words
    assert not failures(tmp_path / "run"), "it was tried again"
    assert time.monotonic() - begin < 60


def test_the_head_is_killed(bench: Bench, tmp_path: Path, record: Record) -> None:
    """No cluster is left. The run goes on without it."""
    bench.is_gone, out = True, tmp_path / "run"
    driver = bench.driver(out)
    in_mid_run(out, "shards", driver)
    head = bench.cluster.head_node
    for part in ("gcs_server", "raylet"):
        for process in head.all_processes[part]:
            os.kill(process.process.pid, signal.SIGKILL)
    words = ended(driver)
    done = {path: path.stat().st_mtime_ns for path in out.glob("tasks/*/manifest.json")}
    # what needs no more of the head may come to its end without it
    whole = (out / "report.json").exists() and folder_bytes(out / "model") == bench.of("shards")
    again = attempt(["run", str(bench.folder / "job.yaml"), "--out", str(out)])
    assert again.code == 0, again.words
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    equal = folder_bytes(out / "model") == bench.of("shards")
    first = "ends" if whole else "exit code 4"
    record(Row("cluster", "head", "it is killed in mid-sweep", first,
               "goes on without a cluster, nothing done twice", 1, equal))  # fmt: skip
    assert equal
    assert driver.returncode == (0 if whole else 4), words
    assert "Traceback" not in words
