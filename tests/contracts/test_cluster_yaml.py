"""The shipped cluster files are ones that Ray accepts, or that KubeRay's fields allow, and their
clusters ask for a token.
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayprune.orchestrator.cli import _parser

ROOT = Path(__file__).parents[2]
LAUNCHED = {
    "cloud": ROOT / "cluster.yaml",
    "on-premises": ROOT / "examples" / "clusters" / "on-premises.yaml",
}
RAYJOB = ROOT / "examples" / "clusters" / "kuberay-rayjob.yaml"
SAME = (
    "setup_commands",
    "file_mounts",
    "rsync_exclude",
    "rsync_filter",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(params=LAUNCHED)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A launcher file, with Ray's defaults filled in as `ray up` does."""
    prepared: dict[str, Any] = prepare_config(read(LAUNCHED[request.param]))
    return prepared


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_gpu_workers_are_two_to_eight() -> None:
    cloud = read(LAUNCHED["cloud"])
    worker = cloud["available_node_types"]["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"], cloud["max_workers"]) == (2, 8, 8)


def test_machines_on_premises_are_all_kept_up() -> None:
    machines = read(LAUNCHED["on-premises"])
    assert (
        machines["min_workers"]
        == machines["max_workers"]
        == len(machines["provider"]["worker_ips"])
    )


@pytest.mark.parametrize("key", SAME)
def test_both_launcher_files_do_the_same(key: str) -> None:
    cloud, machines = (read(path) for path in LAUNCHED.values())
    assert cloud[key] == machines[key]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_start_asks_for_a_token(cluster: dict[str, Any], key: str) -> None:
    starts = [command for command in cluster[key] if "ray start" in command]
    assert starts
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return read(RAYJOB)


def pods(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod of the head, then one of each worker group."""
    spec = rayjob["spec"]["rayClusterSpec"]
    return [
        group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]


def ray_version() -> str:
    """The lowest Ray that the package allows, as written in its dependencies."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = [
        re.match(r"ray>=([\d.]+)", entry) for entry in dependencies if entry.startswith("ray>")
    ]
    assert found
    return found[1]


def test_rayjob_has_what_kuberay_requires(rayjob: dict[str, Any]) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert rayjob["metadata"]["name"]
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert "rayStartParams" in spec["rayClusterSpec"]["headGroupSpec"]
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert {"groupName", "rayStartParams", "template"} <= group.keys()
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in pods(rayjob):
        assert [
            set(container) >= {"name", "image", "resources"} for container in pod["containers"]
        ] == [True]


def test_rayjob_runs_the_pinned_ray(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == f"{ray_version()}.0"
    assert f"FROM rayproject/ray:{ray_version()}.0-" in (ROOT / "Dockerfile").read_text()


def test_rayjob_asks_for_a_token(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {
        "mode": "token",
        "secretName": "rayprune-token",
    }
    assert (
        "kubectl create secret generic rayprune-token --from-literal=auth_token="
        in RAYJOB.read_text()
    )


def test_rayjob_pods_share_one_volume(rayjob: dict[str, Any]) -> None:
    for pod in pods(rayjob):
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
        }
        assert volumes == {"shared": "rayprune-shared"}
        assert [
            mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]
        ] == ["shared"]


def test_rayjob_resources_have_limits(rayjob: dict[str, Any]) -> None:
    for pod in pods(rayjob):
        for container in pod["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_rayjob_command_is_ours_and_fits_the_cluster(rayjob: dict[str, Any]) -> None:
    """The paths lie on the volume, and the workers fit into the largest cluster."""
    program, *words = shlex.split(rayjob["spec"]["entrypoint"])
    assert program == "rayprune"
    options = _parser().parse_args(words)
    settings = dict(setting.split("=") for setting in options.overrides)
    (mount,) = pods(rayjob)[0]["containers"][0]["volumeMounts"]
    assert all(path.is_relative_to(mount["mountPath"]) for path in (options.job, options.out))
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert int(settings["parallel.workers"]) <= group["maxReplicas"] * gpus
    assert settings["parallel.device"] == "cuda"
    assert settings["cluster.address"] == "auto"
    assert int(settings["cluster.wait_seconds"]) > 0
