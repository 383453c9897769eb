"""The benchmark for a machine with one GPU, on the CPU and over tiny models."""

import os
import shutil
import time
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

import benchmarks
from benchmarks import gpu, gpu_sweep, random_model, yardstick
from benchmarks.random_model import SHAPES, write_model
from tests.conftest import MakeModel


def here(work: gpu.Work, options: Namespace, seconds: float) -> gpu.Outcome:
    """Run a part in this process."""
    return work(options)


def measure(folder: Path, words: str) -> int:
    """Run the command over a tiny model."""
    common = f"--device cpu --shape tiny --folder {folder} --results {folder / 'results'}"
    return gpu.main([*common.split(), *words.split()])


def rows(page: str) -> list[list[str]]:
    """The lines of a page's first table."""
    lines = page[page.index("\n| ") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_sweeps_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "in_a_process", here)
    assert measure(tmp_path, "--layers 2 5 --only sparse,kernels,sweep-5,sweep-2") == 0
    files = sorted((tmp_path / "results").iterdir())
    kernels, two, five, sparse = (file.read_text() for file in files)
    for page, names in (
        (two, ["0", "1"]),
        (five, ["0", "1", "2", "median of 2 more", "slowest of them"]),
    ):
        heads, _, *layers = rows(page)
        work = ["collect", "decide", "write_layer", "advance", "finish_writing"]
        assert heads == ["layer", "seconds", *work]
        assert [row[0].split(",")[0] for row in layers] == names
        for _, seconds, *steps in layers:
            assert 0 < sum(map(float, steps)) <= float(seconds) + 0.03
        assert "First use" in page
        assert "Under way" not in page
    assert kernels.count("two runs agree in all bits") == 2
    assert "128 of the first 128 pivots" in kernels
    assert len(rows(sparse)) == 2 + 3 * 3, "three matrices and numbers of tokens"
    assert not list(tmp_path.glob("run-*"))


def test_layers_are_written_as_they_finish(tmp_path: Path) -> None:
    written: list[str] = []
    progress = gpu_sweep.Progress(7, written.append)
    for layer in range(2):
        event = {"event": "step-finished", "stage": "sweep", "layer": layer}
        progress(event | {"seconds": 1.0 + layer, "steps": {"collect": 0.5}})
    assert written[-1].endswith("| 1 | 2.00 | 0.50 |\n\nUnder way: 2 of 7 layers.")


def test_a_part_starts_only_if_the_time_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep is judged by the one before it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pretend(work: gpu.Work, options: Namespace, seconds: float) -> gpu.Outcome:
        assert options.seconds_left == seconds == 600 - gpu.SPARE_SECONDS - now[0]
        now[0] += 100.0
        return "done", {"layers": 4, "per_layer": 20.0} if isinstance(work, partial) else {}

    monkeypatch.setattr(gpu, "in_a_process", pretend)
    assert measure(tmp_path, "--minutes 10 --layers 4 20 19") == 0
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "tests: done (100 s)",
        "sweep-4: done (100 s)",
        "sweep-20: left out: too little time",
        "sweep-19: left out: too little time",
        "kernels: done (100 s)",
        "sparse: done (100 s)",
    ]
    now[0] = 0.0
    assert measure(tmp_path, "--minutes 10 --layers 4 18 --only sweep-4,sweep-18") == 0
    assert "sweep-18: done (100 s)" in capsys.readouterr().out


def test_a_part_ends_at_the_limit_or_with_its_process() -> None:
    start = time.monotonic()
    assert gpu.in_a_process(time.sleep, 60, 0.5) == ("KILLED after 0 s", {})
    assert time.monotonic() - start < 10
    assert gpu.in_a_process(os._exit, 3, 60) == ("FAILED (3)", {})


def test_a_small_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=29e9))
    reason = gpu_sweep.too_little_space(tmp_path / "model", SHAPES["llama-2-7b"], 32)
    assert reason == f"29 GB free in {tmp_path}, 30 GB needed"
    assert not gpu_sweep.too_little_space(tmp_path / "model", SHAPES["llama-2-7b"], 30)


def test_layers_depend_on_seed_and_number_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = write_model("tiny", tmp_path / "few", 2), tmp_path / "many"
    other = write_model("tiny", tmp_path / "other", 2, seed=1)
    monkeypatch.setattr(random_model, "_SMALL", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    write_model("tiny", many, 3)
    files = ["outer.safetensors", "layer-00000.safetensors", "layer-00001.safetensors"]
    contents = [[(folder / file).read_bytes() for file in files] for folder in (few, many, other)]
    assert contents[0] == contents[1]
    assert len({*contents[0], *contents[2]}) == 6


@pytest.mark.parametrize("file", sorted(Path(benchmarks.__path__[0]).glob("*.py")), ids=str)
def test_every_benchmark_finds_what_it_calls(file: Path) -> None:
    """Names that others have are imported at the top, so that a benchmark that lost one is seen."""
    if file.stem != "gpu_kernels":  # needs Triton
        import_module(f"benchmarks.{file.stem}")


def test_the_yardstick_is_zero_at_the_dense_model(make_model: MakeModel, text_file: Path) -> None:
    model = make_model()
    found = yardstick.measured(model, model, {"text": text_file}, "cpu", most=1)
    assert found["divergence"] == {"text": 0.0}
    assert found["agreement"] == {"text": 1.0}
    assert found["perplexity"]["text"] > 1.0
