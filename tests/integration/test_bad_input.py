"""Bad input: a clear error on stderr that says what and where, the right exit code, nothing
half-done.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.verify import verify_run
from tests.conftest import MakeJob, MakeModel, folder_bytes

Capture = pytest.CaptureFixture[str]


def fails(arguments: list[str], code: int, capsys: Capture) -> str:
    """Run a command that must fail with this exit code; what it printed on stderr."""
    capsys.readouterr()
    assert main(arguments) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budget.sparsty=0.2", ["budget.sparsty", "unknown field", "sparsity"]),
        ("method.name=stta", ["method.name", 'did you mean "stat"']),
        ("budget.sparsity=1.5", ["budget.sparsity", "less than 1", "1.5"]),
        ("cluster.executor=rey", ["cluster.executor", 'did you mean "ray"']),
        ("memory.worker=8Gib2", ["memory.worker", "is not a size"]),
        ("parallel.workers=99", ["parallel.workers", "calibration.shards"]),
        ("budget.kv_groups=3", ["budget.kv_groups", "more than the model's 2"]),
        ("budget.sparsity=0.99", ["budget", "lower budget.sparsity"]),
        ("calibration.samples=5000", ["too short", "320000", "calibration.samples"]),
        ("calibration.path=/nowhere.txt", ["/nowhere.txt", "cannot be read"]),
    ],
)
def test_bad_option(
    override: str,
    words: list[str],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    message = fails(
        ["run", str(make_job(make_model())), "--out", str(tmp_path / "run"), "--set", override],
        2,
        capsys,
    )
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("path", "words"),
    [("/nowhere.txt", "cannot be read"), (None, "is read for calibration or training too")],
)
def test_an_evaluation_text_that_will_not_do_is_found_before_the_run_folder_is_made(
    path: str | None,
    words: str,
    make_model: MakeModel,
    make_job: MakeJob,
    text_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    job = make_job(
        make_model(), evaluation={"path": path or str(text_file), "window": 128, "max_windows": 8}
    )
    message = fails(["run", str(job), "--out", str(tmp_path / "run")], 2, capsys)
    assert words in message
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_calibration_text_is_found_before_any_layer(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "copy.txt").write_bytes(text_file.read_bytes())
    job = make_job(
        make_model(),
        evaluation={"path": str(tmp_path / "copy.txt"), "window": 8, "max_windows": 99},
    )
    message = fails(["run", str(job), "--out", str(tmp_path / "run")], 2, capsys)
    assert "stand in the windows for calibration" in message
    assert {folder.name for folder in (tmp_path / "run" / "tasks").iterdir()} == {
        "calibration-tokens"
    }


def test_exponent_notation_is_a_number(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(make_model())
    job.write_text(job.read_text() + "correction:\n  damping: 1e-3\n")
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {layer["groups"]["neurons"]["damping"] for layer in report["layers"]} == {1e-3}


def _remove(model: Path) -> None:
    model.rename(model.with_name("elsewhere"))


def _pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def _truncate(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def _point_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _set(model: Path, weight: str, entries: Any, number: float) -> None:
    """Give some entries of a weight another value."""
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.{weight}.weight"][entries] = number
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _poison(model: Path) -> None:
    _set(model, "layers.2.self_attn.q_proj", (0, 0), torch.nan)


def _drop_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove, ["no such model folder", "model.path"]),
        (_pickle, ["pytorch_model.bin", "a pickle", "safetensors"]),
        (_truncate, ["model.safetensors", "not a whole safetensors file"]),
        (_point_outside, ["../outside.safetensors", "only safetensors files of this folder"]),
        (_poison, ["model.layers.2.self_attn.q_proj.weight", "NaN"]),
        (_drop_tokenizer, ["no usable tokenizer"]),
    ],
)
def test_bad_model(
    damage: Callable[[Path], None],
    words: list[str],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    model = make_model()
    damage(model)
    message = fails(
        ["run", str(make_job(model, budget={"kv_groups": 2})), "--out", str(tmp_path / "run")],
        3,
        capsys,
    )
    assert all(word in message for word in words), message


def test_a_weight_too_large_for_the_exported_type_is_found_before_the_sweep(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    model = make_model()
    _set(model, "layers.2.mlp.up_proj", (0, 0), 1e5)
    job = make_job(model, export={"dtype": "float16"}, budget={"kv_groups": 2})
    message = fails(["run", str(job), "--out", str(tmp_path / "run")], 3, capsys)
    assert "model.layers.2.mlp.up_proj.weight: 1e+05 is too large for float16; set" in message
    assert not list((tmp_path / "run" / "tasks").glob("layer-*"))


def test_poisoned_layer_keeps_the_finished_ones(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    model = make_model()
    _poison(model)
    fails(
        ["run", str(make_job(model, budget={"kv_groups": 2})), "--out", str(tmp_path / "run")],
        3,
        capsys,
    )
    assert [
        path.parent.name for path in sorted((tmp_path / "run").rglob("layer-*/manifest.json"))
    ] == ["layer-0000", "layer-0001"]


@pytest.mark.parametrize("placement", ["shards", "layers"])
@pytest.mark.parametrize(
    ("weight", "number", "dtype", "advice"),
    [
        ("layers.0.mlp.down_proj", 3e4, "float16", "set model.dtype: float32"),
        ("layers.1.mlp.up_proj", 1e30, "float32", "its weights are too large"),
        ("layers.1.mlp.down_proj", 3e38, "float32", "its weights are too large"),
    ],
    ids=str,
)
def test_activations_that_are_not_finite_are_told_by_the_probe_too(
    weight: str,
    number: float,
    dtype: str,
    advice: str,
    placement: str,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    model = make_model()
    _set(model, weight, ..., number)
    job = make_job(model, parallel={"placement": placement, "workers": 1})
    command = ["run", str(job), "--out", str(tmp_path / "run"), "--set", f"model.dtype={dtype}"]
    message = fails(command, 3, capsys)
    assert "is not finite" in message
    assert advice in message


@pytest.mark.slow
def test_run_folder_of_another_job(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["run", str(make_job(make_model())), "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main([*arguments, "--set", "export.dtype=bfloat16"]) == 0
    (line,) = (
        line
        for line in capsys.readouterr().out.splitlines()
        if "task-stale" in line and "task=outer" in line
    )
    assert 'export.dtype: "auto" -> "bfloat16"' in line
    verify_run(tmp_path / "run")


def test_folder_that_is_no_run(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    message = fails(
        ["run", str(make_job(make_model())), "--out", str(tmp_path / "thesis")], 2, capsys
    )
    assert "is not empty" in message
    for words, said in (
        (["verify"], "is no run folder"),
        (["push", "a/b"], "is no run folder"),
        (["report"], "no report.json here"),
    ):
        assert said in fails([words[0], str(tmp_path / "thesis"), *words[1:]], 2, capsys)


def test_a_store_that_is_a_file(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "store").write_text("")
    run = ["run", str(make_job(make_model())), "--out", str(tmp_path / "run")]
    message = fails([*run, "--store", str(tmp_path / "store")], 2, capsys)
    assert "store: File exists; give a folder, or a place for one" in message


def test_changed_model_under_an_old_run(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    job = make_job(make_model())
    arguments = ["run", str(job), "--out", str(tmp_path / "run"), "--set", "budget.kv_groups=2"]
    assert main(arguments) == 0
    make_model(num_hidden_layers=4)
    assert main(arguments) == 0
    assert "task-stale task=source" in capsys.readouterr().out
    assert main([*arguments[:3], str(tmp_path / "fresh"), *arguments[4:]]) == 0
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(tmp_path / "fresh" / "model")


def test_too_little_memory(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    message = fails(
        [
            "run",
            str(make_job(make_model())),
            "--out",
            str(tmp_path / "run"),
            "--set",
            "memory.worker=100MB",
        ],
        4,
        capsys,
    )
    assert "memory.worker" in message
    assert "needs at least" in message
