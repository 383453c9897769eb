"""The job's types: bounds, sizes and what counts as part of the result."""

import pytest
from pydantic import BaseModel, ValidationError

from rayprune.specs.job import JobSpec
from rayprune.specs.sizes import parse_bytes
from rayprune.specs.training import TrainingSpec
from rayprune.workers.store.training_stage import total_steps

Section = dict[str, object]


def make_job(**sections: Section) -> JobSpec:
    """A job with the given sections over the required ones."""
    return JobSpec.model_validate(
        {"model": {"path": "/m"}, "calibration": {"path": "/c"}} | sections
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        (" 2tb ", 2 * 10**12),
        ("3TiB", 3 * 2**40),
        ("7mib", 7 * 2**20),
        ("9kB", 9000),
        ("4GB", 4 * 10**9),
        ("123", 123),
        ("123B", 123),
        (42, 42),
        (None, None),
        (True, True),
    ],
)
def test_sizes(text: object, size: object) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8G", "8XiB", "eight", "1,5GiB", "8 8GiB", "nan", "inf", "1e999", "infGiB"]
)
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example 8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("section", "field", "accepted", "refused"),
    [
        ("calibration", "samples", [8, 1_000_000], [1, 1_000_001, 8.5]),
        ("calibration", "sequence_length", [8, 1_048_576], [7, 1_048_577]),
        ("calibration", "shards", [2, 128], [1, 129, 4097]),
        ("calibration", "held_out_shards", [1, 7], [0, 8]),
        ("budget", "sparsity", [0.001, 0.999], [0.0, 1.0, float("nan"), float("inf"), "much"]),
        ("budget", "round_to", [1, 4096, "auto"], [0, 4097, "all"]),
        ("budget", "kv_groups", [1, "auto"], [0, "all", None]),
        ("budget", "probe_samples", [2, 128], [1, 129]),
        ("correction", "damping", [0.0, 1e6, "held-out"], [-1e-9, 2e6, float("inf"), "auto"]),
        ("correction", "candidates", [(1.0,), (1.0,) * 32], [(), (1.0,) * 33, (0.0,), (2e6,)]),
        ("parallel", "workers", [1, 8], [0, 9]),
        ("parallel", "retries", [0, 100], [-1, 101]),
        ("parallel", "step_seconds", [1, "auto"], [0, "never"]),
        ("cluster", "connect_seconds", [1, 86_400], [0, 86_401]),
        ("cluster", "start_seconds", [1, 86_400], [0, 86_401]),
        ("parallel", "placement", ["shards", "layers"], ["tokens"]),
        ("parallel", "propagation", ["auto", "pruned"], ["dense", "refit", "sparse"]),
        ("memory", "worker", [None, 1, "1GiB"], [0, "-1GiB", "much"]),
        ("memory", "checkpoint_layers", [0, 10_000], [-1]),
        ("export", "target", ["transformers", ["vllm", "gguf"]], ["onnx", ["gguf", "onnx"], []]),
        ("export", "tensor_parallel", [1, 256], [0, 257]),
        ("cluster", "address", ["local", "auto"], [""]),
        ("method", "factorization", ["gram", "qr"], ["svd"]),
    ],
)
def test_bounds(section: str, field: str, accepted: list[object], refused: list[object]) -> None:
    def options(value: object) -> dict[str, Section]:
        required: dict[str, Section] = {"calibration": {"path": "/c"}, "method": {"name": "stat"}}
        return {section: required.get(section, {}) | {field: value}}

    for value in accepted:
        make_job(**options(value))
    for value in refused:
        with pytest.raises(ValidationError, match=rf"\b{field}\b"):
            make_job(**options(value))


@pytest.mark.parametrize(
    ("stride", "fits"), [(None, True), (1, True), (16, True), (17, False), (0, False)]
)
def test_stride_lies_within_the_window(stride: int | None, fits: bool) -> None:
    evaluation: Section = {"path": "/e", "window": 16, "stride": stride}
    if fits:
        assert make_job(evaluation=evaluation).evaluation is not None
    else:
        with pytest.raises(ValidationError, match="stride"):
            make_job(evaluation=evaluation)


def test_every_section_is_frozen_closed_and_documented() -> None:
    job = make_job(evaluation={"path": "/e"})
    for name in JobSpec.model_fields:
        section = getattr(job, name)
        if not isinstance(section, BaseModel):
            continue
        field = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, "x")
        with pytest.raises(ValidationError, match="unknown_field"):
            type(section).model_validate({"unknown_field": 1})
        undocumented = [
            key
            for key, info in type(section).model_fields.items()
            if not info.description and key != "name"
        ]
        assert undocumented == []


@pytest.mark.parametrize(
    ("section", "options", "counts"),
    [
        ("cluster", {"executor": "in-process"}, False),
        ("memory", {"worker": 1}, False),
        ("evaluation", {"path": "/e"}, False),
        ("parallel", {"workers": 4}, False),
        ("parallel", {"retries": 0}, False),
        ("parallel", {"threads_per_worker": 2}, True),
        ("parallel", {"micro_batch": 2}, True),
        ("budget", {"sparsity": 0.5}, True),
        ("export", {"target": "vllm"}, True),
        ("model", {"path": "/other"}, True),
    ],
)
def test_result_part(section: str, options: Section, counts: bool) -> None:
    assert (make_job(**{section: options}).result_part() != make_job().result_part()) == counts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"correction": {"damping": 0.1, "candidates": [1.0]}}, "none is tried with damping: 0.1"),
        ({"recover": {"samples": 8, "own_samples": 4}}, "recover.samples takes 8 of 16"),
        ({"recover": {"own_samples": 999_990}}, "more than 1,000,000 windows"),
        ({"recover": {"seed": 2**32}}, "less than 4294967296"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Section], words: str) -> None:
    sections = {"calibration": {"path": "a.txt", "samples": 16, "own": {}}}
    make_job(**sections)
    with pytest.raises(ValidationError, match=words):
        make_job(**sections | changes)


TRSP: Section = {"name": "trsp"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"kv_groups": 2, "probe_samples": 8}}, "probe_samples: .*kv_groups says it"),
        ({"budget": {"per_layer": True, "probe_layers": 2}}, "probe_layers: .*per_layer chooses"),
        ({"method": TRSP | {"norm": "l1"}}, "norm: transfer: shrink does not read it"),
        ({"method": TRSP | {"update_strength": 1.0}}, "update_strength: transfer: shrink"),
        (
            {"method": TRSP | {"transfer": "penalty", "shrink_strength": 1.0}},
            "shrink_strength: transfer: penalty",
        ),
        ({"method": TRSP, "correction": {"damping": 0.1}}, "whole layers; leave out correction"),
        ({"method": TRSP, "budget": {"probe_layers": 8}}, "leave out budget.probe_layers"),
        ({"method": {"name": "stat", "gradient_samples": 8}}, "gradient_samples: scale: weights"),
        ({"method": {"name": "dress", "mask": "stat", "seed": 1}}, "seed: mask: stat draws"),
        (
            {"method": {"name": "numerical", "head_score": "times-cost"}},
            "head_score: budget.allocation: threshold alone",
        ),
        (
            {"method": {"name": "progressive", "inner": {"name": "stat", "gradient_samples": 8}}},
            "gradient_samples: scale: weights",
        ),
        ({"export": {"pad": True}}, "pad: without budget.per_layer all layers are alike"),
        ({"evaluation": {"path": "/e", "prompt_tokens": 8}}, "prompt_tokens: there are no prompts"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(changes: dict[str, Section], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make_job(**changes)


def test_steps_are_counted_as_people_count() -> None:
    """1.1 times 100 is a little more than 110."""
    assert total_steps(TrainingSpec(epochs=1.1, batch=10), 100) == 11
