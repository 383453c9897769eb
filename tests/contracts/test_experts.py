"""What holds for every family with experts, beside what holds for all (`test_families.py`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.network.building import whole_model
from rayprune.workers.numerics.correction import Correction
from rayprune.workers.numerics.linalg import unit_rows
from rayprune.workers.steps import deciding
from tests.conftest import MakeJob
from tests.contracts.test_families import SIZES, SMALL, generates, logits_of, same, spread
from tests.helpers import mixtures, quiet, some, stored_numbers
from tests.models import build_model


@pytest.fixture(scope="module", params=some(mixtures(), "qwen3_moe", "gpt_oss"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return build_model(tmp_path_factory.mktemp(name) / "dense", name, **SIZES)


def stock(folder: Path) -> Any:
    """The stock network, whose experts are computed one by one."""
    network = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return network.eval()


def test_experts_one_by_one_are_the_stock_ones(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    found, expected = logits_of(whole_model(checkpoint).eval()), logits_of(stock(folder))
    same(found, expected, 1e-6)


class _Never(TorchFunctionMode):
    """Routers give some experts logits that are never chosen."""

    def __init__(self, gone: dict[int, Tensor]) -> None:
        """`gone` experts by the address of a router's weight."""
        super().__init__()
        self._gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func is nn.functional.linear
            and (gone := self._gone.get(args[1].data_ptr())) is not None
        ):
            result = result.index_fill(-1, gone, -1e9)
        return result


@contextmanager
def without(
    network: Any, checkpoint: Checkpoint, kept: Mapping[int, Sequence[int]]
) -> Iterator[Any]:
    """The stock network, whose routers never choose experts that go."""
    group = checkpoint.model.experts
    assert group is not None
    gone = {}
    for layer, stays in kept.items():
        module = network.get_submodule(f"{checkpoint.model.layers_at}.{layer}")
        router, *more = (module.state_dict()[axis.tensor] for axis in group.axes)
        others = torch.tensor(sorted(set(range(group.num_units)) - set(stays)))
        gone[router.data_ptr()] = others
        for correction in more if group.axes[-1].tensor.endswith("correction_bias") else ():
            correction[others] = -1e9
    with _Never(gone):
        yield network


@pytest.mark.parametrize("differing", [False, True])
def test_a_model_of_fewer_experts_is_the_dense_one_that_never_chooses_the_others(
    differing: bool,
    folder: Path,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those with the smallest scores go; widths shrink as well, alike in all layers or not."""
    checkpoint = open_checkpoint(folder)
    group, units = checkpoint.model.experts, checkpoint.model.units
    assert group is not None
    monkeypatch.setattr(
        deciding,
        "correct",
        lambda training, held_out, weight_DF, kept_K, *rest: Correction(
            weight_DF[:, kept_K].contiguous(), 0.0, 0.0, 0.0
        ),
    )
    out, size = tmp_path / "run", group.num_units // group.parts
    stays = [3 * group.num_units // 4] * checkpoint.num_layers
    budget: dict[str, Any] = {"experts": stays[0], "kv_groups": units["heads"], "sparsity": 0.4}
    if differing and checkpoint.model.sized_alike:
        return
    if differing:
        stays[1:3] = group.num_units, group.num_units // 2
        spread(monkeypatch, unlike(checkpoint, stays))
        budget = {"per_layer": True}
    job = make_job(folder, calibration=SMALL, budget=budget | {"round_to": 1})
    report = run_job(load_job(job), out, quiet)
    layers = [layer.groups for layer in report.layers]
    kept = {n: g["experts"].units or () for n, g in enumerate(layers) if "experts" in g}
    whole = {layer for layer, count in enumerate(stays) if count == group.num_units}
    whole |= set(checkpoint.model.lacking.get("experts", ()))
    assert set(range(len(layers))) - kept.keys() == whole
    for layer, experts in kept.items():
        scores = layers[layer]["experts"].scores or ()
        assert len(experts) == stays[layer]
        assert len({sum(e // size == part for e in experts) for part in range(group.parts)}) == 1
        gone = set(range(group.num_units)) - set(experts)
        for start in range(0, group.num_units, size):  # as many go from each part
            part = range(start, start + size)
            worst = min(scores[e] for e in part if e in experts)
            assert max(scores[e] for e in part if e in gone) <= worst
    network, info = AutoModelForCausalLM.from_pretrained(
        out / "model", output_loading_info=True, trust_remote_code=differing
    )
    assert not any(info.values()), info
    assert stored_numbers(network) == report.parameters.after
    dense, model = whole_model(checkpoint).eval(), checkpoint.model
    handles = []
    for layer in range(len(layers)):
        manifest = json.loads((out / f"tasks/layer-{layer:04d}/manifest.json").read_text())
        for name, units_kept in manifest["info"]["kept"].items():
            member = model.members[name]
            if member.kind != "experts":
                stay = torch.zeros(member.width)
                stay[unit_rows(torch.tensor(units_kept), member.columns)] = 1.0
                module = dense.get_submodule(f"{model.layers_at}.{layer}.{member.consumer.module}")
                handles.append(
                    module.register_forward_pre_hook(lambda _, args, stay=stay: (args[0] * stay,))
                )
    with without(dense, checkpoint, kept) as expected:
        same(logits_of(network.eval()), logits_of(expected))
    same(logits_of(whole_model(open_checkpoint(out / "model")).eval()), logits_of(network))
    generates(network)


def unlike(checkpoint: Checkpoint, experts: Sequence[int]) -> list[dict[str, int]]:
    """Units of layers that all differ: so many experts, of other widths in each."""
    groups = checkpoint.model.groups
    return [
        {g.name: g.num_units if g.fixed else g.num_units - layer % g.num_units for g in groups}
        | {g.name: g.num_units - 8 * layer for g in groups if g.kind == "ffn"}
        | {"experts": count}
        for layer, count in enumerate(experts)
    ]
