"""In which steps units stay, and what engines do with other widths."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayprune.orchestrator.planning.engines import fallbacks
from rayprune.orchestrator.planning.rounding import told_of_sizes, unit_steps
from rayprune.orchestrator.planning.shapes import Shape, open_shapes
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Model
from rayprune.workers.model.families import family_of
from tests.conftest import MakeJob, MakeModel

SIZES = {  # hidden, query heads, KV groups, head size, FFN channels
    "smollm2-135m": (576, 9, 3, 64, 1536),
    "llama-2-7b": (4096, 32, 32, 128, 11008),
    "llama-2-13b": (5120, 40, 40, 128, 13824),
    "llama-3-8b": (4096, 32, 8, 128, 14336),
    "tiny": (32, 4, 2, 8, 48),
}


def model_of(name: str) -> Model:
    hidden, heads, groups, size, width = SIZES[name]
    config = Config(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": size,
            "intermediate_size": width,
            "num_hidden_layers": 2,
            "vocab_size": 1000,
        }
    )
    return family_of(config).describe(config)


def job_of(round_to: int | str = "auto", gpus: int = 1) -> JobSpec:
    sections: dict[str, Any] = {
        "model": {"path": "/m"},
        "calibration": {"path": "/c"},
        "budget": {"round_to": round_to},
        "export": {"tensor_parallel": gpus},
    }
    return JobSpec.model_validate(sections)


@pytest.mark.parametrize(
    ("name", "round_to", "gpus", "heads", "neurons"),
    [
        ("smollm2-135m", "auto", 1, 1, 64),  # a group has 192 = 3 x 64 inputs
        ("llama-2-7b", "auto", 1, 2, 256),  # a group has 128
        ("llama-2-13b", "auto", 1, 2, 256),
        ("llama-3-8b", "auto", 1, 1, 256),  # a group has 512
        ("tiny", "auto", 1, 2, 32),  # 16 of 32 inputs a group
        ("llama-2-7b", "auto", 4, 8, 1024),
        ("llama-3-8b", "auto", 2, 2, 512),
        ("llama-3-8b", "auto", 8, 8, 2048),
        ("llama-3-8b", "auto", 16, 8, 4096),  # two GPUs share a group: all stay
        ("llama-2-7b", 64, 1, 1, 64),
        ("llama-2-7b", 64, 4, 4, 256),
        ("smollm2-135m", 2, 3, 3, 6),
    ],
)
def test_steps(name: str, round_to: int | str, gpus: int, heads: int, neurons: int) -> None:
    steps = unit_steps(job_of(round_to, gpus), model_of(name))
    assert steps == {"heads": heads, "neurons": neurons}


def test_gpus_that_do_not_divide_the_model_are_refused() -> None:
    with pytest.raises(SpecError, match=r"tensor_parallel: 3 KV groups with 9 query heads"):
        unit_steps(job_of(gpus=2), model_of("smollm2-135m"))


def test_shapes_keep_whole_steps(make_model: MakeModel, make_job: MakeJob) -> None:
    model = make_model(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=256
    )
    checkpoint = open_checkpoint(model)

    def kept(budget: dict[str, Any], **export: Any) -> list[dict[str, int]]:
        job = load_job(make_job(model, budget={"round_to": "auto"} | budget, export=export))
        return [dict(shape.kept) for shape in open_shapes(job, checkpoint)]

    # 8 inputs a group: 32 are four groups
    assert [shape["heads"] for shape in kept({"sparsity": 0.3})] == [8, 4]
    assert all(shape["neurons"] % 32 == 0 for shape in kept({"sparsity": 0.3}))
    fixed = kept({"round_to": 4, "sparsity": 0.3}, tensor_parallel=2)
    assert [shape["heads"] for shape in fixed] == [8, 6, 4, 2]
    assert all(shape["neurons"] % 8 == 0 for shape in fixed)
    assert kept({"kv_groups": 5})[0]["heads"] == 5  # as asked for
    with pytest.raises(SpecError, match=r"kv_groups: 5 cannot be split over 2 GPUs"):
        kept({"kv_groups": 5}, tensor_parallel=2)


@pytest.mark.parametrize(
    ("name", "channels", "gpus", "said"),
    [
        ("smollm2-135m", 1126, 1, {"llama.cpp": "in F16", "vLLM": "128", "torch": "16-bit"}),
        ("smollm2-135m", 1088, 1, {"llama.cpp": "K-quants", "vLLM": "128"}),
        ("smollm2-135m", 1280, 1, {}),
        ("smollm2-135m", 1536, 1, {}),
        ("llama-2-7b", 8960, 1, {}),
        ("llama-3-8b", 11008, 8, {"vLLM": "128 on each of 8 GPUs"}),
    ],
)
def test_fallbacks_are_named(name: str, channels: int, gpus: int, said: dict[str, str]) -> None:
    model = model_of(name)
    shape = Shape({"heads": model.units["heads"], "neurons": channels}, 1, 1)
    found = fallbacks(model, [shape], gpus)
    assert {text.partition(":")[0] for text in found} == said.keys()
    assert all(said[text.partition(":")[0]] in text for text in found)
    assert all("mlp.down_proj.weight" in text for text in found)


def test_widths_of_a_matrix_are_named_together() -> None:
    model = model_of("smollm2-135m")
    shapes = [Shape({"heads": 3, "neurons": channels}, 1, 1) for channels in (1088, 1280, 1216)]
    found = fallbacks(model, shapes, 1)
    assert len(found) == 2
    assert all("1088, 1216 inputs of mlp.down_proj.weight are no" in text for text in found)


@pytest.mark.parametrize(
    ("budget", "removed", "words"),
    [
        ({"sparsity": 0.1}, 0.125, "more than the 10.00% asked for: FFN channels come in"),
        ({"sparsity": 0.1}, 0.1024, None),
        ({"sparsity": 0.1, "round_to": 1}, 0.125, None),
        ({"sparsity": 0.1, "per_layer": True}, 0.125, "together 90.00% of the decoder"),
        ({"parameters": 10**8}, 0.3, None),
    ],
)
def test_a_plan_says_why_more_goes_than_was_asked_for(
    budget: dict[str, Any], removed: float, words: str | None, make_job: MakeJob, tmp_path: Path
) -> None:
    job = load_job(make_job(tmp_path / "not read", budget={"sparsity": None, **budget}))
    dense: Any = SimpleNamespace(model=model_of("smollm2-135m"), decoder_parameters=10**6)
    found = told_of_sizes(job, dense, round((1 - removed) * 10**6))
    assert found is None if words is None else words in (found or "")
