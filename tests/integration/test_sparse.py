"""`method: sparse`: zeros where they should be, on activations of the sparse layers below, and the
same wherever and however often a run is started.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rayprune import load_sparse
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.reporting.plan_view import plan_parts
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, RaypruneError, SpecError, VerificationError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.sites import sites_of
from rayprune.workers.numerics.sparsity import sparsify
from rayprune.workers.numerics.statistics import GramStatistic
from rayprune.workers.store.files import remove_task
from tests.conftest import MakeJob, MakeModel, edit_json, flip_bit, folder_bytes
from tests.helpers import SCRATCH, families, quiet, some

WHOLE: dict[str, Any] = {"sparsity": None, "round_to": "auto"}
"""A budget as it is where a job gives none."""


def sparse_job(make_job: MakeJob, model: Path, **sections: Any) -> Path:
    method = {"name": "sparse"} | sections.pop("method", {})
    return make_job(model, **({"budget": WHOLE} | sections), method=method)


def weights_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def planned(job: Path, *overrides: str) -> Plan:
    spec = load_job(job, overrides)
    return plan_job(spec, open_checkpoint(Path(spec.model.path)))


@pytest.mark.parametrize("family", some(families(), "llama", "gpt2"))
def test_corrected_zeros_beat_the_mask_alone_at_every_site(
    family: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model, out = make_model(family), tmp_path / "run"
    job = load_job(sparse_job(make_job, model))
    report = run_job(job, out, quiet)
    verify_run(out)
    sites = sites_of(open_checkpoint(model).model)
    dense, sparse = weights_of(model), weights_of(out / "model")
    told = json.loads((out / "model" / "sparsity.json").read_text())
    assert (told["pattern"], told["score"], told["damping"]) == ("2:4", "obs", 0.01)
    prefix = open_checkpoint(model).model.prefix(0)
    for name, site in sites.items():
        for layer in report.layers:
            group = layer.groups[name]
            assert group.mask_error is not None
            assert group.held_out_error < group.mask_error
            assert 2 * group.kept <= group.of
        for weight in site.weights:
            matrix = sparse[prefix + weight].T if site.transposed else sparse[prefix + weight]
            assert int((matrix.reshape(-1, 4) != 0).sum(1).max()) == 2
            zeros = told["tensors"][prefix + weight]["zeros"]
            assert zeros == int((matrix == 0).sum()) == matrix.numel() // 2
    assert len(told["tensors"]) == len(report.layers) * sum(len(s.weights) for s in sites.values())
    others = sparse.keys() - told["tensors"].keys()
    assert all(torch.equal(sparse[name], dense[name]) for name in others if name in dense)


def test_every_site_reads_what_the_sparse_ones_before_it_leave(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """The same matrices as from hooks on the stock model, into which they go one by one."""
    model, out = make_model(), tmp_path / "run"
    job = load_job(sparse_job(make_job, model))
    run_job(job, out, quiet)
    found = weights_of(out / "model")
    tokens_ST = load_file(out / "tasks" / "calibration-tokens" / "tokens.safetensors")["tokens"]
    stock = AutoModelForCausalLM.from_pretrained(model)
    sites, masks = sites_of(open_checkpoint(model).model), job.method.masks
    assert masks is not None
    for layer in range(2):
        for site in sites.values():
            modules: list[nn.Linear] = [
                stock.get_submodule(f"model.layers.{layer}.{name.removesuffix('.weight')}")
                for name in site.weights
            ]
            fits = [GramStatistic.empty(site.input.width, SCRATCH) for _ in range(2)]
            for part, fit in zip((tokens_ST[:12], tokens_ST[12:]), fits, strict=True):
                hook = modules[0].register_forward_pre_hook(
                    lambda _, given, fit=fit: fit.update(given[0].flatten(0, -2))
                )
                with torch.inference_mode():
                    stock(part)
                hook.remove()
            dense = [module.weight.detach() for module in modules]
            wanted = [torch.float32] * len(dense)
            made = sparsify(*(fit.finished() for fit in fits), dense, masks, wanted)
            for name, module, weight in zip(site.weights, modules, made.weights, strict=True):
                written = found[f"model.layers.{layer}.{name}"]
                assert torch.equal(written == 0, weight == 0)
                torch.testing.assert_close(written, weight, rtol=1e-3, atol=1e-5)
                module.weight.data = written


@pytest.mark.parametrize("kept", [0, 1])
def test_a_run_goes_on_to_the_same_bytes(
    kept: int, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, force_memory: Any
) -> None:
    """From finished layers or saved hidden states, recomputing what it reads or not; an option of
    the method makes all layers stale.
    """
    out, options = tmp_path / "run", {"method": {"sites": ["down", "qkv"]}}
    model = make_model("gpt_neox", dtype=torch.bfloat16)
    job = sparse_job(make_job, model, memory={"checkpoint_layers": kept}, **options)
    run_job(load_job(job), out, quiet)
    first = folder_bytes(out / "model")
    assert list(json.loads(first["sparsity.json"])["layers"][0]) == ["qkv", "down"]
    remove_task(out / "tasks" / "layer-0002")
    remove_task(out / "model")
    force_memory(keep_inputs=False)
    events: list[dict[str, Any]] = []
    run_job(load_job(job), out, events.append)
    done = [e["layer"] for e in events if e["event"] == "step-finished" and "layer" in e]
    assert done == [2]
    again = folder_bytes(out / "model")
    assert {n: b for n, b in again.items() if n != "README.md"} == {
        n: b for n, b in first.items() if n != "README.md"
    }
    run_job(load_job(job, ["method.damping=0.1"]), out, events.append)
    assert sum(e["event"] == "task-stale" for e in events) >= 3
    assert folder_bytes(out / "model")["sparsity.json"] != first["sparsity.json"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_make_the_same_bytes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = sparse_job(make_job, make_model(dtype=torch.bfloat16), method={"pattern": "unstructured"})
    run_job(load_job(job), tmp_path / "one", quiet)
    overrides = ["cluster.executor=ray", "parallel.workers=3"]
    run_job(load_job(job, overrides), tmp_path / "three", quiet)
    one, three = (folder_bytes(tmp_path / name / "model") for name in ("one", "three"))
    own = ("README.md", "manifest.json")
    assert {n: b for n, b in one.items() if n not in own} == {
        n: b for n, b in three.items() if n not in own
    }


def test_a_plan_says_what_it_takes(make_model: MakeModel, make_job: MakeJob) -> None:
    job = sparse_job(make_job, make_model())
    plan = planned(job, "method.sites=[up]")
    # gate and up of three layers, half of each
    assert plan.zeros == 3 * 2 * 32 * 48 // 2
    assert plan.shape.decoder_parameters == plan.model.decoder_parameters
    (layer,) = plan.layers
    assert layer.statistics_flops == 16 * 64 * 32**2, "one statistic, of what gate and up read"
    assert layer.correction_flops == 2 * (2 * 32**3 // 3) + (2 + 5) * 32 * 96 * 32
    assert any("zeros in matrices that keep" in str(part) for part in plan_parts(plan))
    magnitude = planned(job, "method={name: sparse, score: magnitude}")
    assert magnitude.needs.worker_memory_bytes <= planned(job).needs.worker_memory_bytes


REFUSED = {
    "method.pattern=unstructured,budget.sparsity=0.3": "leave out budget",
    "correction.drift=0.5": "leave out correction",
    "recover={}": "leave out recover",
    "parallel.placement=layers": "leave out parallel.placement: layers",
    "method.sparsity=0.5": "pattern 2:4 says it",
    "method.score=wanda,method.damping=0.1": "corrects nothing",
    "method.sites=[]": "sites",
    "model.path=odd": "reads 50 numbers, no multiple of 4; leave down out of method.sites",
    "model.path=bert": "bert is an encoder",
    "model.path=mixtral": "mixtral is a mixture of experts",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_has_no_effect_or_cannot_be_is_refused(
    overrides: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    make_model(name="odd", intermediate_size=50)
    for family in ("bert", "mixtral"):
        make_model(family, name=family)
    job = sparse_job(make_job, tmp_path / "odd")
    given = [each.replace("path=", f"path={tmp_path}/") for each in overrides.split(",")]
    with pytest.raises(SpecError) as refused:
        planned(job, *given)
    assert REFUSED[overrides] in str(refused.value)


def test_a_sparse_model_is_loaded_dense_on_a_cpu(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model, out = make_model(), tmp_path / "run"
    job = sparse_job(make_job, model, method={"score": "wanda"})
    run_job(load_job(job, ["calibration.samples=4"]), out, quiet)
    load = partial(load_sparse, out / "model", device="cpu")
    with pytest.warns(UserWarning, match="runs dense: on cpu torch has no"):
        loaded = load()
    stock = AutoModelForCausalLM.from_pretrained(out / "model")
    tokens_BT = torch.arange(8)[None]
    torch.testing.assert_close(loaded(tokens_BT).logits, stock(tokens_BT).logits)

    def refused(kind: type[RaypruneError], words: str) -> None:
        with pytest.raises(kind, match=words):
            load()

    (file,) = (f for f in (out / "model").glob("*-00002-*") if f.suffix == ".safetensors")
    whole = load_file(file)
    name = next(name for name in whole if name.endswith("down_proj.weight"))
    whole[name][:, :3] = 1.0
    save_file(whole, file, {"format": "pt"})
    refused(VerificationError, "has other zeros than were told of it")
    with pytest.raises(VerificationError):
        verify_run(out)
    tensors = json.loads((out / "model" / "sparsity.json").read_text())["tensors"]
    tensors[name]["zeros"] = int((whole[name] == 0).sum())
    edit_json(out / "model" / "sparsity.json", tensors=tensors)
    refused(VerificationError, "of 4 neighbouring weights . are not zero")
    edit_json(out / "model" / "sparsity.json", tensors=3)
    refused(ModelError, "is damaged")
    flip_bit(out / "model" / "sparsity.json", 0)
    refused(ModelError, "cannot be read as JSON")
    (out / "model" / "sparsity.json").unlink()
    refused(ModelError, "no sparsity.json here")
