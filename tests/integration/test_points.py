"""A sweep: every point is a run like any other, and what points share is computed once."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.run_folder import read_events
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from tests.conftest import MakeJob, folder_bytes
from tests.helpers import quiet
from tests.models import build_model


@pytest.fixture
def job(make_job: MakeJob, text_file: Path, tmp_path: Path) -> Path:
    (tmp_path / "held_out.txt").write_text(text_file.read_text()[40_000:44_000])
    evaluation = {"path": str(tmp_path / "held_out.txt"), "window": 32, "max_windows": 4}
    return make_job(
        build_model(tmp_path / "dense"), evaluation=evaluation, parallel={"placement": "layers"}
    )


def sweep(job: Path, out: Path, *words: str) -> int:
    return main(["sweep", str(job), "--out", str(out), *words])


def test_points_are_runs_and_share_what_they_can(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    sparsities = ("--set", "budget.sparsity=0.2,0.4", "--within", "9")
    assert sweep(job, out, *sparsities) == 0
    words = " ".join(capsys.readouterr().out.split())
    found = json.loads((out / "sweep.json").read_text())
    assert found["points"] == 2
    assert [run["name"] for run in found["runs"]] == ["budget.sparsity=0.2", "budget.sparsity=0.4"]
    assert found["recommended"] == "budget.sparsity=0.4"
    assert "Recommended is budget.sparsity=0.4, the smallest model of at most 9 times" in words
    single = run_job(load_job(job, ["budget.sparsity=0.4"]), tmp_path / "single", quiet)
    second = out / found["runs"][1]["run"]
    assert folder_bytes(second / "model") == folder_bytes(single.run / "model")
    assert verify_run(second)
    steps = [event.get("step_seconds", {}) for event in read_events(second)]
    assert not any("flow" in taken for taken in steps)  # the statistics were the first point's
    assert "<figure>" in (out / "sweep.html").read_text()
    links = re.findall(r'href="(runs/[^"]+)"', (out / "sweep.html").read_text())
    assert links
    assert all((out / unquote(link)).is_file() for link in links)
    before = folder_bytes(out)
    assert sweep(job, out, *sparsities) == 0
    again = folder_bytes(out)
    assert all(again[name] == before[name] for name in before if "model" in name)


def test_a_point_that_cannot_be_is_named_before_any_work(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(job, tmp_path / "sweep", "--set", "budget.sparsity=0.2,0.999") == 2
    assert "budget.sparsity=0.999: budget: no shape" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert sweep(job, tmp_path / "sweep", "--within", "0") == 2


def test_runs_are_compared(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for run, sparsity in zip(runs, (0.2, 0.4), strict=True):
        run_job(load_job(job, [f"budget.sparsity={sparsity}"]), Path(run), quiet)
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--html", str(page)]) == 0
    words = capsys.readouterr().out
    assert "budget.sparsity: 0.2 -> 0.4" in words
    assert "<h2>Jobs</h2>" in page.read_text()
    assert main(["compare", runs[0]]) == 2
    assert main(["compare", *runs, "--html", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert page.exists()


@pytest.mark.usefixtures("drawn")
def test_points_that_cannot_be_compared_stand_side_by_side(job: Path, tmp_path: Path) -> None:
    assert sweep(job, tmp_path / "sweep", "--set", "evaluation.window=16,32") == 0
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "perplexities were measured in different ways" in page


def test_a_section_does_not_take_the_place_of_a_value_before_it(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--set", "budget.sparsity=0.2,0.4", "--set", "budget={round_to: 4, kv_groups: 2}")
    assert sweep(job, tmp_path / "sweep", *words) == 2
    assert "takes the place of --set budget.sparsity" in capsys.readouterr().err
    assert load_job(job, [words[3], "budget.sparsity=0.4"]).budget.sparsity == 0.4
