"""Invariants of jobs, plans, shards, selections and files under generated input: few examples among
the fast tests, more with `make test-faults` (`--hypothesis-profile=faults`).
"""

import json
import math
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.random_model import SIZES
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.reporting.report import read_report
from rayprune.specs.errors import ModelError, RaypruneError, ResourceError, SpecError
from rayprune.specs.loader import dump_job, load_job
from rayprune.workers.model.checkpoint import open_checkpoint, planned_checkpoint
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.shards import even_parts, grow_tree, merge_siblings, owned_nodes, roots
from tests.faults.forks import ROOT
from tests.models import build_model

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

JOB: dict[str, Any] = {"model": {"path": "/m"}, "calibration": {"path": "/t"}}
SECTIONS = ("model", "calibration", "budget", "method", "correction", "parallel", "memory")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(SECTIONS), st.dictionaries(st.text(max_size=16), VALUES)))
def test_a_job_of_anything_is_valid_or_refused(document: dict[str, Any]) -> None:
    try:
        job = load_job(JOB | document)
    except SpecError:
        return
    assert dump_job(load_job(yaml.safe_load(dump_job(job)))) == dump_job(job)


@given(st.text(max_size=300) | st.binary(max_size=300))
@SAME_FOLDER
def test_a_file_of_anything_is_a_job_or_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "job.yaml"
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path.write_bytes(data)
    with pytest.raises(SpecError, match=r"job\.yaml"):
        load_job(path)


@given(st.floats(0.01, 0.99), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from(["", "gradients"]))
def test_what_is_valid_is_the_same_when_it_is_read_again(
    sparsity: float, round_to: int, scale: str
) -> None:
    method = {"scale": scale} if scale else {}
    budget = {"sparsity": sparsity, "round_to": round_to}
    job = load_job(JOB | {"budget": budget, "method": method})
    assert load_job(yaml.safe_load(dump_job(job))) == job


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "dense")


def planned(model: Path, **sections: Any) -> Any:
    """The plan of a job over the model, or None where it cannot be met."""
    calibration = {"path": "/t", "samples": 16, "sequence_length": 32, "shards": 4}
    fixed = {"model": {"path": str(model)}, "calibration": calibration}
    parallel = {"parallel": {"device": "cpu"}, "cluster": {"executor": "in-process"}}
    job = load_job(fixed | parallel | sections)
    try:
        return make_plan(job, planned_checkpoint(model))
    except (SpecError, ResourceError):
        return None


@given(
    st.floats(0.01, 0.95), st.floats(0.0, 0.5), st.sampled_from([1, 4, 8]), st.sampled_from([1, 2])
)
def test_a_larger_budget_never_leaves_less(
    model: Path, sparsity: float, more: float, round_to: int, kv_groups: int
) -> None:
    """Of two sparsities the larger one keeps no more; each meets its target, with whole steps."""
    fixed = {"round_to": round_to, "kv_groups": kv_groups}
    plans = [
        planned(model, budget=fixed | {"sparsity": value})
        for value in (sparsity, min(sparsity + more, 0.97))
    ]
    if None in plans:
        assert plans[1] is None, "a smaller sparsity was refused, a larger one was not"
        return
    kept = [plan.shape.kept for plan in plans]
    for shape, target in zip(kept, (sparsity, min(sparsity + more, 0.97)), strict=True):
        assert shape["heads"] == kv_groups
        assert 0 < shape["neurons"] <= SIZES["intermediate_size"]
        assert shape["neurons"] % round_to == 0 or shape["neurons"] == SIZES["intermediate_size"]
        assert removed(shape) >= target - 1e-9
    assert kept[1]["neurons"] <= kept[0]["neurons"]


def removed(shape: dict[str, int]) -> float:
    """Fraction of the decoder layers' parameters that goes, counted by hand."""

    def parameters(groups: int, width: int) -> int:
        heads = groups * SIZES["num_attention_heads"] // SIZES["num_key_value_heads"]
        attention = (2 * heads + 2 * groups) * SIZES["head_dim"] * SIZES["hidden_size"]
        return attention + 3 * width * SIZES["hidden_size"] + 2 * SIZES["hidden_size"]

    dense = parameters(SIZES["num_key_value_heads"], SIZES["intermediate_size"])
    return 1 - parameters(shape["heads"], shape["neurons"]) / dense


@given(st.integers(1, 300), st.integers(1, 40))
def test_parts_are_even_and_cover_everything(count: int, parts: int) -> None:
    ranges = even_parts(count, parts)
    assert [item for part in ranges for item in part] == list(range(count))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 12), st.randoms())
def test_the_tree_is_the_same_whoever_sums(
    shards: int, held_out: int, workers: int, draw: Any
) -> None:
    """Sums as nested pairs: any spread over workers and any order of arrival gives the same one."""
    for root in roots(shards, min(held_out, shards - 1)):

        def merge(left: Any, right: Any) -> tuple[Any, Any]:
            return (left, right)

        expected = grow_tree(root, lambda shard: shard, merge)
        nodes = {
            node: grow_tree(node, lambda shard: shard, merge)
            for part in even_parts(shards, workers)
            for node in owned_nodes(root, part)
        }
        arrived: dict[Any, Any] = {}
        for node in draw.sample(sorted(nodes), len(nodes)):
            arrived = merge_siblings(root, arrived | {node: nodes[node]}, merge)
        assert arrived == {root: expected}


def test_weights_of_any_bytes_are_read_or_refused(tmp_path_factory: Any) -> None:
    """Headers of safetensors files, and indexes, of anything."""
    folder = build_model(tmp_path_factory.mktemp("bytes") / "dense")
    good = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", good[:8])[0]

    @given(st.integers(0, length + 7), st.binary(min_size=1, max_size=12))
    def mutated(place: int, data: bytes) -> None:
        whole = good[:place] + data + good[place + len(data) :]
        (folder / "model.safetensors").write_bytes(whole)
        try:
            open_checkpoint(folder)
        except ModelError:
            return

    mutated()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_an_index_of_anything_is_refused(tmp_path_factory: Any, weight_map: Any) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"}))
    text = json.dumps({"weight_map": {"model.norm.weight": weight_map}})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError):
        open_checkpoint(folder)


@given(st.dictionaries(st.sampled_from(sorted(SIZES)), SCALARS, max_size=3))
@SAME_FOLDER
def test_a_config_of_anything_is_planned_or_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    clean = {k: v for k, v in changes.items() if not isinstance(v, float) or math.isfinite(v)}
    text = json.dumps(SIZES | {"model_type": "llama"} | clean)
    (tmp_path / "config.json").write_text(text)
    save_file({}, tmp_path / "model.safetensors")
    with suppress(RaypruneError):
        planned_checkpoint(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
MANIFEST = st.fixed_dictionaries(
    {}, optional={name: JSON for name in ("task", "fingerprint", "made_from", "files", "info")}
)


@given(JSON | MANIFEST | st.binary(max_size=200))
@SAME_FOLDER
def test_a_manifest_of_anything_is_none_or_one(tmp_path: Path, content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "manifest.json").write_bytes(data)
    found = read_manifest(tmp_path)
    assert found is None or isinstance(found.info, dict)


@given(JSON | st.binary(max_size=200))
@SAME_FOLDER
def test_a_report_of_anything_is_refused(tmp_path: Path, content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "report.json").write_bytes(data)
    with pytest.raises(RaypruneError):
        read_report(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("target", ["yaml", "weights", "index", "manifest", "report"])
def test_bytes_that_are_led_by_what_they_reach(target: str) -> None:
    """Atheris: what a reader raises is one of our errors, for a few seconds."""
    pytest.importorskip("atheris", reason="pip install 'rayprune[fuzz]'")
    words = [sys.executable, "-m", "tests.faults.fuzz_bytes", target, "--seconds", "8"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr[-3000:]
