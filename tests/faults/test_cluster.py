"""A real multi-node Ray cluster on this machine: a node is killed in mid-sweep, or comes late; the
job ends with the same bytes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from tests.conftest import MakeJob, MakeModel, folder_bytes

SCRIPT = """
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job

names = ("initial_delay_ms", "period_ms", "timeout_ms")
checks = {f"health_check_{name}": 500 for name in names} | {"health_check_failure_threshold": 3}
head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]


def kill_a_node(event):
    if (event["event"] == "micro-batches" or event.get("layer") == 2) and len(nodes) == 3:
        cluster.remove_node(nodes[0], allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1))


settings = ["cluster.executor=ray", f"cluster.address={cluster.address}", "parallel.workers=3"]
run_job(load_job(Path(sys.argv[1]), settings), Path(sys.argv[2]), kill_a_node)
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("placement", "interrupted"), [("shards", "layer-0003"), ("layers", "layers 0 to 4")]
)
def test_killed_node(
    placement: str, interrupted: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    parallel = {"placement": placement, "micro_batch": 1}
    job = make_job(make_model(num_hidden_layers=5), budget={"kv_groups": 1}, parallel=parallel)
    assert main(["run", str(job), "--out", str(tmp_path / "calm")]) == 0
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(job), str(tmp_path / "cluster")],
        capture_output=True,
        timeout=200,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    events = [
        json.loads(line)
        for line in (tmp_path / "cluster" / "events.jsonl").read_text().splitlines()
    ]
    assert [event["task"] for event in events if event["event"] == "worker-failed"] == [interrupted]
    assert folder_bytes(tmp_path / "cluster" / "model") == folder_bytes(tmp_path / "calm" / "model")


LATE = """
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ResourceError
from rayprune.specs.loader import load_job

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1)]
settings = ["cluster.executor=ray", f"cluster.address={cluster.address}", "parallel.workers=2"]


def run(wait, show):
    job = load_job(Path(sys.argv[1]), [*settings, f"cluster.wait_seconds={wait}"])
    run_job(job, Path(sys.argv[2]), show)


def add_a_node(event):
    if event["event"] == "waiting-for-nodes" and len(nodes) == 1:
        nodes.append(cluster.add_node(num_cpus=1))


try:
    run(2, lambda event: None)
    sys.exit("it should have stopped")
except ResourceError as error:
    print(error)
run(60, add_a_node)
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_late_node(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> None:
    """The first run waits two seconds in vain; the second gets its node while it waits."""
    job, out = make_job(make_model(), budget={"kv_groups": 1}), tmp_path / "late"
    assert main(["run", str(job), "--out", str(tmp_path / "calm")]) == 0
    finished = subprocess.run(
        [sys.executable, "-c", LATE, str(job), str(out)],
        capture_output=True,
        timeout=200,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 workers need 2 CPUs, the cluster has 1 CPUs" in finished.stdout
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    waited = [event for event in events if event["event"] == "waiting-for-nodes"]
    assert [event["wait_seconds"] for event in waited] == [2, 60]
    assert waited[0]["have"] == {"CPU": 1.0}
    assert waited[0]["need"] == {"CPU": 2.0}
    assert folder_bytes(out / "model") == folder_bytes(tmp_path / "calm" / "model")
