"""The pages in Chromium: axe, a telephone's width, paper, light and dark, no other file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import SEEN, browser, chromium, opened, wrong_with
from rayprune.orchestrator.cli import main
from rayprune.orchestrator.reporting import charts
from tests.conftest import REALLY_DRAWN, write_job
from tests.models import build_model

pytest.importorskip("axe_playwright_python", reason='needs pip install "rayprune[browser]"')
pytestmark = pytest.mark.skipif(chromium() is None, reason="needs Chromium")
LONG = "prompt-without-a-blank-" * 8


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A sweep over a tiny model, whose point has all that a report may have without training."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "held_out.txt").write_text(text_file.read_text()[40_000:44_000])
    texts = {name: {"path": str(folder / "held_out.txt")} for name in ("first", "other")}
    evaluation = {"texts": texts, "window": 32, "max_windows": 2, "prompts": ["Python is", LONG]}
    model = build_model(folder / "dense")
    job = write_job(folder / "job.yaml", text_file, model, evaluation=evaluation)
    words = ["sweep", str(job), "--out", str(folder), "--set", "budget.sparsity=0.2,0.4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "_drawn", REALLY_DRAWN)
        assert main([*words, "--set", "budget.per_layer=true"]) == 0
    return folder


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as chrome:
        yield chrome


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", ["report.html", "sweep.html"])
def test_nothing_is_wrong_with_a_page(name: str, seen: str, pages: Path, started: Any) -> None:
    (file, *_) = sorted(pages.rglob(name))
    page, heard = opened(started, file, seen)
    assert page.locator("svg").count() >= 1
    assert wrong_with(page) + heard == []
    assert page.pdf(format="A4").startswith(b"%PDF")
