"""`rayprune demo` itself, with a tiny model in place of the one that it fetches."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.workers.tools import demo
from tests.conftest import MakeJob, MakeModel


def test_it_prunes_what_it_has_prepared(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    job = make_job(make_model(num_hidden_layers=1))

    def prepared(_: Path) -> Iterator[str]:
        yield "prepared"

    monkeypatch.setattr(demo, "prepare", prepared)
    monkeypatch.setattr(demo, "prepare_job", lambda _: job)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "run" / "report.json").exists()
    assert "parameters" in capsys.readouterr().out
