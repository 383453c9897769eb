"""Plans against models that transformers builds at the planned sizes."""

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayprune.orchestrator.planning.plan import Plan, make_plan
from rayprune.orchestrator.planning.samples import samples_left_out, samples_tasks
from rayprune.orchestrator.planning.shapes import MAX_OPEN_SHAPES, Shape
from rayprune.orchestrator.planning.worker_memory import whole_model_bytes
from rayprune.orchestrator.reporting.plan_view import plan_parts, print_plan
from rayprune.specs.errors import ResourceError, SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.config import Config
from rayprune.workers.model.families import family_of
from rayprune.workers.network.building import layers_of
from tests.conftest import MakeJob, MakeModel
from tests.helpers import families
from tests.unit.orchestrator.workloads import LOAD

BIASED = {"attention_bias": True, "mlp_bias": True}
VARIANTS: list[Any] = [
    *((name, {}) for name in families("bloom")),
    ("llama", BIASED | {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ("llama", BIASED),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ("llama", {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3}),
]


def planned(model: Path, make_job: MakeJob, **sections: Any) -> tuple[Plan, JobSpec, Checkpoint]:
    job, checkpoint = load_job(make_job(model, **sections)), open_checkpoint(model)
    return make_plan(job, checkpoint), job, checkpoint


def built(checkpoint: Checkpoint, shape: Shape, target: str) -> tuple[int, int]:
    """Decoder parameters and all parameters of the model that transformers builds from the exported
    config.
    """
    there = range(checkpoint.num_layers)
    written = checkpoint.written(there, [shape.kept] * len(there), target, "auto").config
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    config = Config(written)
    layers = layers_of(network, family_of(config).describe(config))
    return sum(p.numel() for p in layers.parameters()), sum(p.numel() for p in network.parameters())


def assert_minimal(
    plan: Plan, shape: Shape, sparsity: float, round_to: int, checkpoint: Checkpoint
) -> None:
    """The budget is met, and with `round_to` more channels it would not be."""
    limit = (1 - sparsity) * plan.model.decoder_parameters + 1e-6
    neurons = checkpoint.model.layers[0].group("neurons")
    step = round_to * plan.model.num_layers * neurons.unit_parameters
    assert shape.decoder_parameters <= limit
    if shape.kept["neurons"] < plan.model.units["neurons"]:
        assert shape.kept["neurons"] % round_to == 0
        assert (
            shape.decoder_parameters + step > limit
            or shape.kept["neurons"] + round_to > plan.model.units["neurons"]
        )


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_counts_are_those_of_the_model_that_results(
    model_type: str, changes: dict[str, Any], target: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model(model_type, **changes)
    heads = open_checkpoint(model).model.layers[0].group("heads")
    for kv_groups in range(1, heads.num_units + 1):
        budget = {"kv_groups": kv_groups, "sparsity": 0.3, "round_to": 2}
        try:
            plan, _, checkpoint = planned(model, make_job, budget=budget, export={"target": target})
        except SpecError as error:
            # most shapes load
            assert kv_groups < heads.num_units
            reason = heads.fixed or "hidden_size to be a multiple of the heads"
            assert reason in str(error)  # noqa: PT017
            continue
        assert (plan.shape.decoder_parameters, plan.shape.parameters) == built(
            checkpoint, plan.shape, target
        )
        assert plan.shape.kept["heads"] == kv_groups
        assert_minimal(plan, plan.shape, 0.3, 2, checkpoint)
        assert plan.document()["remaining_parameters"] == plan.shape.parameters


@pytest.mark.parametrize("sparsity", [0.001, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("round_to", [1, 4, 7, 16])
@pytest.mark.parametrize(("model_type", "target"), [("llama", "transformers"), ("qwen2", "vllm")])
def test_the_budget_is_met_and_not_overdone(
    sparsity: float,
    round_to: int,
    model_type: str,
    target: str,
    make_model: MakeModel,
    make_job: MakeJob,
) -> None:
    model = make_model(model_type)
    plan, _, checkpoint = planned(
        model,
        make_job,
        budget={"sparsity": sparsity, "round_to": round_to},
        export={"target": target},
    )
    for shape in plan.shapes:
        assert_minimal(plan, shape, sparsity, round_to, checkpoint)


@pytest.mark.parametrize("channels", [1, 2, 13, 40, 47])
def test_an_exact_fraction_removes_exactly_so_many_channels(
    channels: int, make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model()
    decoder = open_checkpoint(model).decoder_parameters
    budget = {"sparsity": channels * 3 * 3 * 32 / decoder, "round_to": 1, "kv_groups": 2}
    assert planned(model, make_job, budget=budget)[0].shape.kept["neurons"] == 48 - channels


@pytest.mark.parametrize(
    ("heads", "kv_groups", "candidates"),
    [
        (4, 2, [2, 1]),
        (8, 8, [8, 7, 6, 5]),
        (32, 16, [16, 14, 12, 10]),
        (4, 1, [1]),
        (6, 3, [3, 2, 1]),
    ],
)
def test_open_shapes(
    heads: int, kv_groups: int, candidates: list[int], make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model(
        "qwen3", num_attention_heads=heads, num_key_value_heads=kv_groups, intermediate_size=400
    )
    plan, _, checkpoint = planned(model, make_job, budget={"sparsity": 0.3})
    assert [shape.kept["heads"] for shape in plan.shapes] == candidates
    assert len(plan.shapes) <= MAX_OPEN_SHAPES
    assert all(
        wide.kept["neurons"] <= narrow.kept["neurons"] for wide, narrow in pairwise(plan.shapes)
    )
    for shape in plan.shapes:
        assert_minimal(plan, shape, 0.3, 4, checkpoint)
    if len(candidates) > 1:
        with pytest.raises(ValueError, match="shapes are open"):
            _ = plan.shape
        assert "remaining_parameters" not in plan.document()
    chosen = plan.chosen(plan.shapes[-1])
    assert chosen.shape == plan.shapes[-1]
    assert chosen.document()["remaining_parameters"] == plan.shapes[-1].parameters


def test_groups_that_lose_nothing_are_not_pruned(make_model: MakeModel, make_job: MakeJob) -> None:
    model = make_model()
    heads_alone = planned(model, make_job, budget={"sparsity": 0.1, "kv_groups": 1})[0]
    assert heads_alone.shape.kept == {"heads": 1, "neurons": 48}
    assert heads_alone.pruned_groups(0) == ["heads"]
    assert planned(model, make_job, budget={"kv_groups": 2})[0].pruned_groups(0) == ["neurons"]
    assert planned(model, make_job, budget={"kv_groups": 1, "sparsity": 0.4})[0].pruned_groups(
        0
    ) == ["heads", "neurons"]


def test_one_group_fewer_needs_fewer_channels_gone_where_only_some_shapes_fit(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    """Of the candidates those that cannot meet the budget are left out."""
    model = make_model(intermediate_size=8)
    plan = planned(model, make_job, budget={"sparsity": 0.4, "round_to": 2})[0]
    assert [shape.kept["heads"] for shape in plan.shapes] == [1]


@pytest.mark.parametrize(
    ("model_type", "changes", "budget", "message"),
    [
        ("llama", {}, {"kv_groups": 3}, r"budget\.kv_groups: 3 is more than the model's 2"),
        (
            "llama",
            {},
            {"sparsity": 0.99},
            r"no shape removes 99\.0% of the decoder.*lower budget\.sparsity",
        ),
        (
            "llama",
            {},
            {"sparsity": 0.2, "round_to": 64, "kv_groups": 2},
            r"at least 64 channels \(budget\.round_to\) is left; lower",
        ),
        (
            "gemma2",
            {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3},
            {"kv_groups": 2},
            (
                "gemma2 cannot be written with 4 heads: its config wants hidden_size to be a"
                " multiple of the heads"
            ),
        ),
        (
            "bloom",
            {},
            {"sparsity": 0.2},
            "no shape removes 20.0% of the decoder: bloom: its class makes every FFN four times",
        ),
    ],
)
def test_budgets_that_cannot_be_met(
    model_type: str,
    changes: dict[str, Any],
    budget: dict[str, Any],
    message: str,
    make_model: MakeModel,
    make_job: MakeJob,
) -> None:
    with pytest.raises(SpecError, match=message):
        planned(make_model(model_type, **changes), make_job, budget=budget)


def test_shapes_that_do_not_load_are_no_candidates(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model("gemma2", hidden_size=30, num_attention_heads=6, num_key_value_heads=3)
    assert [shape.kept["heads"] for shape in planned(model, make_job)[0].shapes] == [3, 1]


LONG = {"samples": 128, "sequence_length": 4096, "shards": 4}


def test_memory_decides_what_is_kept(make_model: MakeModel, make_job: MakeJob) -> None:
    model = make_model()

    def plan(limit: int | None, **parallel: int) -> Plan:
        return planned(
            model,
            make_job,
            calibration=LONG,
            memory={"worker": limit},
            parallel=parallel,
            cluster={"executor": "ray"},
        )[0]

    plans = [plan(None)]
    for _ in range(3):
        plans.append(plan(plans[-1].needs.worker_memory_bytes - 1))
    memories = [each.memory for each in plans]
    assert [memory.keep_inputs for memory in memories] == [True, False, False, False]
    assert [memory.spill_hidden for memory in memories] == [False, False, True, True]
    assert [memory.spill_statistics for memory in memories] == [False, False, False, True]
    sizes = [each.needs.worker_memory_bytes for each in plans]
    assert sizes[0] - sizes[1] == 128 * 4096 * 48 * 4
    assert sizes[1] - sizes[2] == 2 * (128 - 2) * 4096 * 32 * 4
    with pytest.raises(
        ResourceError,
        match=r"memory\.worker: a worker needs at least .* it may use .*; raise memory\.worker to",
    ):
        plan(sizes[3] - 1)
    assert replace(plan(sizes[1]).memory, free_bytes=memories[1].free_bytes) == memories[1]
    assert plan(None, workers=4).needs.worker_memory_bytes < sizes[0]
    assert plan(sizes[1] - 1, workers=4).memory.keep_inputs


def test_tasks_are_listed_in_order(
    make_model: MakeModel, make_job: MakeJob, text_file: Path
) -> None:
    model = make_model()
    short = planned(model, make_job, budget={"kv_groups": 2})[0].tasks
    layers = ("layer-0000", "layer-0001", "layer-0002")
    assert tuple(task for task in short if task.startswith("layer")) == layers
    assert short[0] == "calibration-tokens"
    assert short[-2:] == ("outer", "export")
    full = planned(model, make_job, evaluation={"path": str(text_file), "window": 32})[0].tasks
    assert full[:3] == ("calibration-tokens", "source", "shape")
    assert full[-3:] == ("evaluation-tokens", "evaluate-before", "evaluate-after")
    evaluation = {"path": str(text_file), "window": 32, "prompts": ["a"]}
    plan = planned(model, make_job, evaluation=evaluation)[0]
    assert plan.tasks == (*full, "samples-before", "samples-after")


def test_samples_are_left_out_where_the_whole_model_has_no_room(make_job: MakeJob) -> None:
    job = load_job(make_job(Path("/m"), evaluation={"path": "/e", "prompts": ["a"]}))
    needed = whole_model_bytes(LOAD)
    assert samples_left_out(job, LOAD, needed) == samples_left_out(job, LOAD, None) == ""
    words = samples_left_out(job, LOAD, needed - 1)
    assert words.startswith("evaluation.prompts: left out: the dense model takes")
    assert samples_tasks(job, words) == ()


@pytest.mark.parametrize(
    ("dtype", "size"), [("auto", 2), ("float32", 4), ("bfloat16", 2), ("float16", 2)]
)
def test_size_of_the_output(
    dtype: str, size: int, make_model: MakeModel, make_job: MakeJob
) -> None:
    model = make_model(dtype=torch.bfloat16)
    plan = planned(model, make_job, export={"dtype": dtype}, budget={"kv_groups": 2})[0]
    assert plan.output_bytes == plan.shape.parameters * size


def test_the_document_lies_flat(make_model: MakeModel, make_job: MakeJob) -> None:
    plan = planned(make_model(), make_job)[0]
    document, parts = plan.document(), (plan.model, plan.needs, plan.traffic)
    assert len(document) == len(fields(plan)) - len(parts) + sum(
        len(fields(part)) for part in parts
    )
    assert list(document)[:2] == ["model_identity", "model_type"]
    assert document["num_layers"] == 3
    assert document["worker_memory_bytes"] == plan.needs.worker_memory_bytes
    assert document["num_messages"] == plan.traffic.num_messages


def test_printed_plans_show_every_shape(
    make_model: MakeModel, make_job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(make_model(), make_job)[0]
    print_plan(plan)
    shown = capsys.readouterr().out
    for shape in plan.shapes:
        assert f"{shape.kept['neurons']}/48" in shown
    assert f"{plan.model.parameters:,}" in shown
    assert "fewer than 10" not in shown
    print_plan(plan.chosen(plan.shapes[0]))
    assert "picks one" not in capsys.readouterr().out


@pytest.mark.parametrize(("samples", "warned"), [(7, True), (8, False)])
def test_few_tokens_are_warned_of_with_numbers(
    samples: int, warned: bool, make_model: MakeModel, make_job: MakeJob
) -> None:
    plan = planned(
        make_model(), make_job, calibration={"samples": samples, "sequence_length": 60, "shards": 4}
    )[0]
    assert bool(plan.warnings) == warned
    if warned:
        assert "420 calibration tokens are 8.8 per FFN channel" in plan.warnings[0]
        assert "480 tokens would do" in plan.warnings[0]


def test_the_mask_of_a_training_costs_what_the_method_that_chooses_it_does(
    make_model: MakeModel, make_job: MakeJob
) -> None:
    dense, budget = make_model(), {"kv_groups": 1}

    def flops(method: dict[str, str]) -> list[int]:
        plan, _, _ = planned(dense, make_job, budget=budget, method=method)
        return [layer.selection_flops for layer in plan.layers]

    assert flops({"name": "dress", "mask": "obs"}) == flops({"name": "obs"})
    assert flops({"name": "dress"}) == [0]


def test_the_plan_says_which_units_stay_and_why(make_model: MakeModel, make_job: MakeJob) -> None:
    plan, _, _ = planned(make_model("olmo2"), make_job, budget={"sparsity": 0.2})
    assert plan.shape.kept["heads"] == 2
    (said,) = [part for part in plan_parts(plan) if "stay" in str(part)]
    assert str(said).startswith("all KV groups stay: its norms of queries and keys stretch over")
    assert plan.document()["stays"].keys() == {"heads"}
