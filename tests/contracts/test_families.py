"""What holds for every family: its file alone is enough. A new file in `workers/model/families` is
tested here with no further edit.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from rayprune.orchestrator.planning.dropped import droppable
from rayprune.orchestrator.planning.footprint import footprint
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.planning.shapes import Shape, uneven_shape
from rayprune.orchestrator.run import run_job
from rayprune.orchestrator.stages import probe
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import Subject
from rayprune.specs.errors import SpecError
from rayprune.specs.job import CorrectionSpec
from rayprune.specs.loader import load_job
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.description import Group
from rayprune.workers.model.families import family_named, model_types
from rayprune.workers.model.places import stored_shapes
from rayprune.workers.network.building import layers_of, whole_model
from rayprune.workers.network.decoding import decode_by_products, whole_cache
from rayprune.workers.network.layers import (
    apply_cut,
    apply_expert_cuts,
    consumer_input,
    dense_streams,
    finish_layer,
    stream_before,
)
from rayprune.workers.network.micro_batch import MicroBatch
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import StreamedModel, hooked, output_of
from rayprune.workers.numerics.correction import Correction, correct
from rayprune.workers.numerics.linalg import unit_rows
from rayprune.workers.numerics.methods import select
from rayprune.workers.numerics.statistics import GramStatistic
from rayprune.workers.steps import deciding
from tests.conftest import MakeJob
from tests.helpers import some, stored_numbers
from tests.models import VARIANTS, auto_class, build_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
"""Heads are wider than the hidden size over their number, where a class takes a size."""
WINDOWS_BT = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Dense:
    """A tiny dense model of a family: its folder, and the stock network."""

    folder: Path
    checkpoint: Checkpoint
    network: Any

    @property
    def groups(self) -> dict[str, Group]:
        """The groups of all layers; of experts that of each."""
        return self.checkpoint.model.members

    def of(self, layer: int) -> dict[str, Group]:
        """The groups of one layer."""
        return self.checkpoint.model.layers[layer].members

    @property
    def kinds(self) -> list[int]:
        """A layer of every kind."""
        return [numbers.start for _, numbers in self.checkpoint.model.alike]

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the stock network."""
        return layers_of(self.network, self.checkpoint.model)

    def consumer(self, layer: int, name: str) -> Any:
        """A group's consumer in the stock network."""
        return self.layers[layer].get_submodule(self.groups[name].consumer.module)

    @property
    def loading(self) -> Any:
        """What loads it, and what is made of it."""
        return getattr(transformers, self.checkpoint.model.auto_class)

    def predictor(self, network: Any) -> Any:
        """What predicts from token ids of this network, or of one that was made of it."""
        return network.get_submodule(self.checkpoint.model.predictor)

    def logits(self, network: Any = None) -> Tensor:
        """Of the stock forward pass."""
        return logits_of(self.predictor(self.network if network is None else network))

    def streamed(self) -> StreamedModel:
        """The same, layer by layer."""
        return StreamedModel(self.checkpoint, torch.float32, CPU)


@pytest.fixture(
    scope="module", params=some([*model_types(), *VARIANTS], "llama", "gpt_neox", "gemma2")
)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    folder = build_model(tmp_path_factory.mktemp(request.param) / "dense", request.param, **SIZES)
    # lists that the class works out from the layers' numbers, which change when layers go
    raw = json.loads((folder / "config.json").read_text())
    _, given = VARIANTS.get(request.param, ("", dict[str, Any]()))
    text = raw.get("text_config", raw)
    for name in set(family_named(raw["model_type"]).lists) - given.keys():
        text.pop(name, None)
    (folder / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(folder)
    # experts are one module in transformers: see test_experts.py
    if checkpoint.model.experts:
        return Dense(folder, checkpoint, whole_model(checkpoint).eval())
    network = auto_class(raw["model_type"]).from_pretrained(folder)
    return Dense(folder, checkpoint, network.eval())


@torch.inference_mode()
def logits_of(network: Any) -> Tensor:
    """Of the stock forward pass; of a model without a head its last hidden states."""
    plainly = {"use_cache": False} if network.can_generate() else {}
    logits: Tensor = network(input_ids=WINDOWS_BT, **plainly)[0]
    return logits


def same(found: Tensor, expected: Tensor, bound: float = 3e-5) -> None:
    """Equal but for roundings, relative to the size of all."""
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < bound


def weight_of(dense: Dense, layer: int, name: str) -> Tensor:
    """A consumer's weight (D, F)."""
    weight: Tensor = dense.consumer(layer, name).weight.detach()
    return weight.T if dense.groups[name].consumer.transposed else weight


def test_the_description_names_every_tensor_of_the_files(dense: Dense) -> None:
    model = dense.checkpoint.model
    with safe_open(dense.folder / "model.safetensors", framework="pt") as handle:
        found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    described, stored = dict(model.outer), dict(model.outer)
    for number, layer in enumerate(model.layers):
        assert layer.parameters == sum(
            map(torch.Size.numel, map(torch.Size, layer.shapes.values()))
        )
        described |= {model.prefix(number) + name: shape for name, shape in layer.shapes.items()}
        in_file = stored_shapes(layer.shapes, layer.places)
        stored |= {model.prefix(number) + name: shape for name, shape in in_file.items()}
    if model.beside:  # by today's names, and without what goes along
        tensors, stored = dense.checkpoint.tensors, described
        found = {name: i.shape for name, i in tensors.items() if not name.startswith(model.beside)}
    assert stored == found
    modules = dense.network.state_dict()
    names = {model.module_names.get(name, name) for name in described}
    assert names <= modules.keys()
    others = modules.keys() - names
    tied = {
        n for n in others if "rotary" not in n and not (model.beside and n.startswith(model.beside))
    }
    again = {name for name in tied if name.endswith(model.recomputed)}
    assert tied - again <= {model.module_names.get(model.head, model.head)}, "a head that is tied"
    assert bool(tied - again) is model.tied
    for name in filter(None, (model.backbone, model.last_norm)):
        dense.network.get_submodule(name)
    absent = model.beside if model.experts else ()  # of a network of our own
    infos = dense.checkpoint.tensors.items()
    beside = sum(i.num_parameters for n, i in infos if n.startswith(absent or ("\0",)))
    assert dense.checkpoint.parameters - beside == stored_numbers(dense.network)


def test_groups_are_whole(dense: Dense) -> None:
    """In the order in which a layer computes them, under their blocks."""
    for layer in dense.kinds:
        seen: list[str] = []
        with hooked(
            [
                dense.consumer(layer, name).register_forward_pre_hook(
                    lambda *_, name=name, seen=seen: seen.append(name)
                )
                for name in dense.of(layer)
            ]
        ):
            dense.logits()
        groups = dense.of(layer)  # an expert that no token has reached is not computed
        assert seen == [name for name in groups if groups[name].expert is None or name in seen]
    for group in dense.groups.values():
        assert f"{group.consumer.module}.".startswith(f"{group.block.module}.")
        if group.kind != "experts":  # whose axes are the router's
            assert all(group.block.holds(axis.tensor) for axis in group.axes)
        assert group.count == group.active == 1


@torch.inference_mode()
def test_streamed_layers_are_the_whole_model_bit_for_bit(dense: Dense) -> None:
    behind: list[Tensor] = []
    with hooked(
        [
            layer.register_forward_hook(lambda _, args, out: behind.append(output_of(out)))
            for layer in dense.layers
        ]
    ):
        expected = dense.logits()
    streamed = dense.streamed()
    batch = streamed.embed(WINDOWS_BT)
    for index, output_BTD in enumerate(behind):
        finish_layer(streamed.load_layer(index), index, batch, dense.of(index))
        assert torch.equal(batch.hidden_BTD, output_BTD), index
    assert torch.equal(streamed.logits(WINDOWS_BT, batch.hidden_BTD), expected)


@torch.inference_mode()
def test_drift_is_measured_where_blocks_are_added_as_they_are(
    dense: Dense, make_job: MakeJob, tmp_path: Path
) -> None:
    """What a layer gives is what it was given and its blocks' outputs, each times its scale; where
    it is not, the job is refused.
    """
    if dense.checkpoint.model.experts:
        job = make_job(dense.folder, correction={"drift": 0.5})
        with pytest.raises(SpecError, match="drift: set it to 0"):
            run_job(load_job(job), tmp_path / "run", lambda event: None)
        return
    scales = [group.block.scale for group in dense.groups.values()]
    streamed = dense.streamed()
    start, behind, outputs = streamed.embed(WINDOWS_BT), list[Tensor](), dict[str, Tensor]()

    def note(group: Group) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            outputs[group.name] = output_of(output).clone()  # Falcon goes on with it in place
            assert (len(output) if isinstance(output, tuple) else 0) == group.block.returns

        return hook

    last = dense.layers[0].register_forward_hook(
        lambda _, args, output: behind.append(output_of(output))
    )
    blocks = [
        dense.layers[0].get_submodule(group.block.module).register_forward_hook(note(group))
        for group in dense.groups.values()
    ]
    with hooked([last, *blocks]):
        dense.logits()
    sum_BTD = start.hidden_BTD.clone()
    for name, group in dense.groups.items():
        sum_BTD += outputs[name].view_as(sum_BTD) * (
            1.0 if group.block.scale is None else group.block.scale
        )
    if None in scales:
        assert scales == [None] * len(scales)
        assert float((sum_BTD - behind[0]).norm() / behind[0].norm()) > 0.1, "they are added"
        job = make_job(dense.folder, correction={"drift": 0.5})
        with pytest.raises(SpecError, match="does not add its blocks' outputs"):
            run_job(load_job(job), tmp_path / "run", lambda event: None)
        return
    same(sum_BTD, behind[0], 1e-6)
    layer = streamed.load_layer(0)
    streams = dense_streams(layer, 0, start, dense.groups)
    batch = MicroBatch(start.hidden_BTD, start.arguments)
    for name, group in dense.groups.items():
        before_BTD = stream_before(batch, dense.groups, name)
        assert group.block.scale is not None
        outputs[name] = outputs[name].view_as(before_BTD)
        same(before_BTD + group.block.scale * outputs[name], streams[name], 1e-6)
        batch.outputs[group.block.module] = outputs[name]
    assert torch.equal(streams[name], behind[0])


@torch.inference_mode()
def test_stat_at_full_width_is_the_identity(dense: Dense) -> None:
    """All units are chosen, the correction changes no weight, and the layer is what it was."""
    streamed = dense.streamed()
    batch, whole = streamed.embed(WINDOWS_BT), streamed.embed(WINDOWS_BT)
    for index in range(max(dense.kinds) + 1):
        layer, groups, of_experts = streamed.load_layer(index), dense.of(index), dict[str, Cut]()
        for name, group in groups.items():
            if group.kind == "experts":
                continue
            z_TF = consumer_input(layer, index, batch, groups, name).flatten(0, -2)
            half = len(z_TF) * 2 // 3
            fits = [GramStatistic.empty(group.width, Scratch(CPU, None)) for _ in range(2)]
            for fit, rows in zip(fits, (z_TF[:half], z_TF[half:]), strict=True):
                fit.update(rows)
            weight_DF = weight_of(dense, index, name)
            units = select(StatOptions(), fits[0], weight_DF, group.columns, group.num_units)
            assert units.tolist() == list(range(group.num_units))
            columns_K = unit_rows(units, group.columns)
            correction = correct(
                fits[0], fits[1], weight_DF, columns_K, CorrectionSpec(), torch.float32
            )
            assert torch.equal(correction.weight_DK, weight_DF)
            assert correction.training_error == correction.held_out_error == 0
            cut = Cut(name, units, correction.weight_DK)
            if group.expert is None:
                apply_cut(layer, index, batch, groups, name, cut)
            else:
                of_experts[name] = cut
        if of_experts:
            apply_expert_cuts(layer, index, batch, groups, of_experts)
        finish_layer(layer, index, batch, groups)
        finish_layer(layer, index, whole, groups)
        same(batch.hidden_BTD, whole.hidden_BTD, 1e-6)


Kept = Sequence[Mapping[str, Sequence[int]]]
"""The units that stay, of every layer and group."""


def drawn(dense: Dense, counts: Sequence[Mapping[str, int]]) -> Kept:
    """Other units in each layer, and in each expert."""
    chance = random.Random(3)
    return [
        {
            member.name: sorted(chance.sample(range(member.num_units), c[group.name]))
            for group in layer.groups
            if group.name in c
            for member in group.members
        }
        for layer, c in zip(dense.checkpoint.model.layers, counts, strict=True)
    ]


@contextmanager
def masked(dense: Dense, kept: Kept) -> Iterator[Any]:
    """The stock network, in which consumers read zeros from the units that go; of no units, blocks
    give zeros.
    """

    def zeroing(group: Group, units: Sequence[int]) -> Callable[..., tuple[Tensor]]:
        stays = torch.zeros(group.width)
        stays[unit_rows(torch.tensor(units), group.columns)] = 1.0
        return lambda module, args: (args[0] * stays,)

    with hooked(
        [
            dense.consumer(layer, name).register_forward_pre_hook(
                zeroing(dense.groups[name], units)
            )
            for layer, of_layer in enumerate(kept)
            for name, units in of_layer.items()
        ]
    ):
        yield dense.network


def pruned(dense: Dense, kept: Kept, job: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exported model of a job that keeps these units and corrects nothing, loaded as a user
    would.
    """

    def given(self: object, layer: int, name: str, num_kept: int, training: object) -> Tensor:
        units = torch.tensor(kept[layer][name])
        assert len(units) == num_kept
        return units

    def plain(
        training: object, held_out: object, weight_DF: Tensor, kept_K: Tensor, *rest: object
    ) -> Correction:
        return Correction(weight_DF[:, kept_K].contiguous(), 0.0, 0.0, 0.0)

    monkeypatch.setattr(deciding.Deciding, "select", given)
    monkeypatch.setattr(deciding, "correct", plain)
    report = run_job(load_job(job), out, lambda event: None)
    own_code = (out / "model" / "modeling_per_layer.py").exists()
    network, info = dense.loading.from_pretrained(
        out / "model", output_loading_info=True, trust_remote_code=own_code
    )
    assert not any(info.values()), info
    assert stored_numbers(network) == report.parameters.after
    return network.eval()


def generates(network: Any) -> None:
    """With and without a cache the same, if it does; as a model writes its own text too."""
    if not network.can_generate():
        return
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (
        network.generate(WINDOWS_BT, use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    decode_by_products(network)
    assert torch.equal(network.generate(WINDOWS_BT, **options, **whole_cache(network)), plain)


SMALL = {"samples": 4, "sequence_length": 16, "shards": 2}
OTHER_FFNS = ("shared", "dense", "wide_neurons")
"""Groups that keep the same share as the one that a budget says."""


def counts_of(dense: Dense, **changes: int) -> list[dict[str, int]]:
    """Units of every layer: all, but for some groups; another FFN keeps its share."""
    units = dense.checkpoint.model.units
    if "neurons" in changes:
        share = changes["neurons"] / units["neurons"]
        changes |= {n: round(units[n] * share) for n in OTHER_FFNS if n in units}
    return [units | changes] * dense.checkpoint.num_layers


def cut_job(dense: Dense, counts: list[dict[str, int]], make_job: MakeJob) -> Path:
    """A job whose budget is met by exactly these units."""
    job = load_job(make_job(dense.folder))
    after = footprint(dense.checkpoint, counts, job).decoder_parameters
    sparsity = 1 - after / dense.checkpoint.decoder_parameters
    budget = {"kv_groups": counts[0]["heads"], "sparsity": sparsity - 1e-9, "round_to": 1}
    return make_job(dense.folder, calibration=SMALL, budget=budget)


def most_heads(dense: Dense, make_job: MakeJob) -> int | None:
    """The most KV groups below all with which the model can be written; None: none.

    More are refused for a reason, and by the job with the same words.
    """
    group, model = dense.groups["heads"], dense.checkpoint.model
    for kept in range(group.num_units - 1, 0, -1):
        try:
            dense.checkpoint.form(model.units | {"heads": kept}, "transformers")
        except SpecError as error:
            query_heads = SIZES["num_attention_heads"] * kept // group.num_units
            reason = group.fixed or group.stock
            assert model.hidden % query_heads or reason, "every divisor of the hidden size"
            job = make_job(dense.folder, calibration=SMALL, budget={"kv_groups": kept})
            with pytest.raises(SpecError, match=re.escape(str(error))):
                make_plan(load_job(job), dense.checkpoint)
        else:
            assert not group.fixed
            return kept
    assert group.fixed or group.stock
    return None


@pytest.mark.parametrize("name", ["heads", "neurons"])
def test_a_cut_model_is_the_dense_one_with_its_units_masked(
    name: str, dense: Dense, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the family's form, reloaded with stock classes; some units of one group go."""
    ffn = next(g for g in dense.checkpoint.model.groups if g.name == "neurons")
    if reason := ffn.fixed:
        with pytest.raises(SpecError, match=re.escape(reason)):
            run_job(load_job(make_job(dense.folder)), tmp_path / "run", lambda event: None)
        return
    narrower = 56 if dense.checkpoint.model.experts else 60
    stays = narrower if name == "neurons" else most_heads(dense, make_job)
    if stays is None:
        return
    counts = counts_of(dense, **{name: stays})
    others = OTHER_FFNS if name == "neurons" else ()
    beside = {other: counts[0][other] for other in others if other in counts[0]}
    kept = drawn(dense, [{name: stays} | beside] * len(counts))
    assert len(set(map(str, kept))) > 1, "other units in each layer"
    job = cut_job(dense, counts, make_job)
    network = pruned(dense, kept, job, tmp_path / "run", monkeypatch)
    with masked(dense, stayed(tmp_path / "run", kept)) as expected:
        same(dense.logits(network), dense.logits(expected))
    generates(dense.predictor(network))


def stayed(run: Path, kept: Kept) -> Kept:
    """The units that a run kept: those given, but of experts that no token has reached."""
    manifests = [run / f"tasks/layer-{n:04d}/manifest.json" for n in range(len(kept))]
    found = [json.loads(manifest.read_text())["info"]["kept"] for manifest in manifests]
    for given, its in zip(kept, found, strict=True):
        assert all(its[name] == units for name, units in given.items() if "." not in name)
    return found


def spread(monkeypatch: pytest.MonkeyPatch, layers: Sequence[Mapping[str, int]]) -> None:
    """Allocate so many units to every layer."""

    def allocated(context: Context, subject: Subject) -> Shape:
        return uneven_shape(context.job, subject.model.checkpoint, layers)

    monkeypatch.setattr(probe, "allocate", allocated)


def test_padded_layers_are_the_dense_ones_with_their_units_masked(
    dense: Dense, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that keep different numbers of units, filled up with zeros to one size."""
    if dense.checkpoint.model.experts or dense.groups["neurons"].fixed:
        return
    heads, model = dense.groups["heads"], dense.checkpoint.model
    fewer = {"heads": heads.num_units if heads.fixed else heads.num_units // 2}
    counts = [model.followed(model.units | fewer | {"neurons": n}) for n in (50, 17, 64, 33)]
    counts[1] |= {} if heads.fixed else {"heads": 1}
    spread(monkeypatch, counts)
    job = make_job(
        dense.folder, calibration=SMALL, budget={"per_layer": True}, export={"pad": True}
    )
    pruned_names = [name for name in fewer if fewer[name] < dense.groups[name].num_units]
    ffns = model.names_of("ffn")
    kept = drawn(dense, [{n: c[n] for n in (*pruned_names, *ffns)} for c in counts])
    network = pruned(dense, kept, job, tmp_path / "run", monkeypatch)
    with masked(dense, kept) as expected:
        same(dense.logits(network), dense.logits(expected))


def test_fewer_heads_than_stock_classes_hold_come_with_a_class(
    dense: Dense, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a stock class gives the head size no key: layers of different sizes, and alike ones."""
    if not dense.groups["heads"].stock:
        return
    for name, heads in {"other": (5, 1, 8, 3), "alike": (5, 5, 5, 5)}.items():
        counts = [{"heads": n, "neurons": 96 if n == 5 else 12 * n} for n in heads]
        spread(monkeypatch, counts)
        job = make_job(dense.folder, calibration=SMALL, budget={"per_layer": True})
        lost = [
            {n: count for n, count in c.items() if count < dense.groups[n].num_units}
            for c in counts
        ]
        kept = drawn(dense, lost)
        network = pruned(dense, kept, job, tmp_path / name, monkeypatch)
        assert (tmp_path / name / "model" / "modeling_per_layer.py").exists()
        with masked(dense, kept) as expected:
            same(dense.logits(network), dense.logits(expected))


def test_whole_layers_out_is_the_dense_model_without_them(
    dense: Dense, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, model = dense.checkpoint.num_layers, dense.checkpoint.model
    for layer, reason in model.stay.items():
        job = make_job(dense.folder, budget={"drop_layers": [layer], "sparsity": None})
        with pytest.raises(SpecError, match=f"layer {layer} has to stay: {reason}"):
            droppable(load_job(job), dense.checkpoint)
    out = next(layer for layer in range(count) if layer not in model.stay)
    job = make_job(dense.folder, calibration=SMALL, budget={"drop_layers": [out], "sparsity": None})
    network = pruned(dense, [{}] * count, job, tmp_path / "run", monkeypatch)
    assert len(layers_of(network, model)) == count - 1
    streamed = dense.streamed()
    batch = streamed.embed(WINDOWS_BT)
    for index in (layer for layer in range(count) if layer != out):
        finish_layer(streamed.load_layer(index), index, batch, dense.of(index))
    same(dense.logits(network), streamed.logits(WINDOWS_BT, batch.hidden_BTD))
    generates(dense.predictor(network))
