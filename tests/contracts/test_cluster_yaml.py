"""The shipped cluster launcher file is one that this Ray accepts, and its cluster asks for a token."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_YAML = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The launcher file, with Ray's defaults filled in as `ray up` does."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load(CLUSTER_YAML.read_text(encoding="utf-8")))
    return prepared


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_gpu_workers_are_two_to_eight(cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"], cluster["max_workers"]) == (2, 8, 8)


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_start_asks_for_a_token(cluster: dict[str, Any], key: str) -> None:
    starts = [command for command in cluster[key] if "ray start" in command]
    assert starts
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]
