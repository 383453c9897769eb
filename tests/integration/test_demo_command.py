"""`rayprune demo` itself, with a tiny model in place of the one that it fetches."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.specs.errors import SpecError
from rayprune.workers.tools import demo
from tests.conftest import MakeJob, MakeModel


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_it_leaves_alone_what_is_not_its_own(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A project with a model and a job of its own."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 32}')
    (tmp_path / "model" / file).write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is another model than the demo's; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "model" / file).read_text() == "mine"
    (tmp_path / "job.yaml").write_text("model: {path: model}\n")
    with pytest.raises(SpecError, match="is another job than the demo's"):
        demo.prepare_job(tmp_path)
    (tmp_path / "job.yaml").unlink()
    written = demo.prepare_job(tmp_path)
    assert demo.prepare_job(tmp_path) == written


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
