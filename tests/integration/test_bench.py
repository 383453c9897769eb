"""Models measured side by side, and what a run's report and card tell of it."""

import json
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.commands.bench import named
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.reporting.report import read_report
from rayprune.orchestrator.reporting.speeds import Speeds, speed_table
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.engines.agreement import compare_run
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.tools.bench import Conditions, bench
from tests.conftest import MakeJob, MakeModel
from tests.helpers import quiet

SPEED = {
    "name": "dense",
    "identity": "",
    "parameters": 1000,
    "bytes_on_disk": 2**20,
    "kv_bytes_per_token": 384,
    "first_token_seconds": 0.5,
    "prefill_tokens_per_second": 1000.0,
    "decode_tokens_per_second": 20.0,
    "peak_memory_bytes": 2**30,
    "prefill_ratio": 1.0,
    "decode_ratio": 1.0,
}
CONDITIONS = {
    "machine": "somewhere",
    "device": "cpu",
    "dtype": "float32",
    "versions": {"torch": "2"},
    "tokens": 512,
    "new": 32,
    "rounds": 5,
    "price_per_hour": 3.6,
}


@pytest.mark.slow
def test_sizes_are_right_and_speeds_are_those_of_the_models(make_model: MakeModel) -> None:
    models = [make_model(), make_model(name="smaller", num_key_value_heads=1, num_hidden_layers=2)]
    dense, small = bench(models, Conditions(tokens=16, new=3, rounds=2))
    # keys and values of 8 numbers in fp32
    assert (dense.kv_bytes_per_token, small.kv_bytes_per_token) == (
        3 * 2 * 2 * 8 * 4,
        2 * 2 * 8 * 4,
    )
    assert small.parameters == open_checkpoint(models[1]).parameters < dense.parameters
    assert (dense.prefill_ratio, dense.decode_ratio) == (1.0, 1.0)
    for speed in (dense, small):
        assert speed.prefill_tokens_per_second == pytest.approx(16 / speed.first_token_seconds)
        assert 2**25 < speed.peak_memory_bytes < 2**32


def test_a_price_tells_what_a_million_tokens_cost() -> None:
    faster = SPEED | {"name": "pruned", "decode_tokens_per_second": 40.0}
    table = speed_table(Speeds.model_validate(CONDITIONS | {"models": [SPEED, faster]}))
    rows = {title: cells for title, *cells in table.rows}
    assert table.columns == ["", "dense", "pruned"]
    assert rows["KV bytes per token"] == ["384", "384"]
    assert rows["first token, ms"] == ["500.0", "500.0"]
    assert rows["prefill, price of 1M tokens"] == ["1", "1"]  # 3.6 an hour, 1000 a second
    assert rows["decode, price of 1M tokens"] == ["50", "25"]


def test_report_page_and_card_tell_what_was_measured_of_a_run_until_its_shape_changes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = load_job(make_job(make_model())), tmp_path / "run"
    run_job(job, run, quiet)
    card = run / "model" / "README.md"
    before = card.read_text()

    def measured(models: dict[str, Path], options: object) -> Speeds:
        found = [
            SPEED | {"name": name, "identity": open_checkpoint(path).identity}
            for name, path in models.items()
        ]
        return Speeds.model_validate(CONDITIONS | {"models": found})

    monkeypatch.setattr("rayprune.orchestrator.commands.bench.measured", measured)
    assert main(["bench", "--run", str(run), "--price", "3.6"]) == 0
    report = read_report(run)
    assert report.speeds is not None
    assert [model.name for model in report.speeds.models] == ["dense", "pruned"]
    assert "| decode, tokens/s | 20.0 | 20.0 |" in card.read_text()
    assert "on somewhere, in float32" in (run / "report.html").read_text()
    assert "bench.json" in json.loads((run / "report.json").read_text())["records"]["files"]
    verify_run(run)
    told = card.read_text()
    assert run_job(job, run, quiet).speeds == report.speeds
    assert card.read_text() == told
    other = job.model_copy(update={"budget": job.budget.model_copy(update={"sparsity": 0.5})})
    assert run_job(other, run, quiet).speeds is None
    assert "tokens/s" not in card.read_text()
    assert "tokens/s" not in before


def test_a_run_or_models_are_measured_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == main(["bench", "some", "--run", "other"]) == 2
    assert "one of the two" in capsys.readouterr().err


def test_models_are_told_apart_by_the_ends_of_their_paths() -> None:
    paths = [Path("/a/one/run/model"), Path("/b/one/run/model"), Path("/b/two/model")]
    found = named(paths)
    assert list(found) == ["a/one/run/model", "b/one/run/model", "/b/two/model"]
    assert list(found.values()) == paths
    assert list(named(paths[1:])) == ["run/model", "two/model"]
    with pytest.raises(SpecError, match="is named twice"):
        named([paths[0], paths[0]])


def test_what_a_model_cannot_is_refused_by_name(
    make_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, learned = make_model("bert"), make_model("gpt2", name="learned")
    assert main(["bench", str(encoder)]) == 2
    assert "is an encoder" in capsys.readouterr().err
    assert main(["bench", str(learned), "--tokens", "250", "--new", "7"]) == 2
    assert "--new: 7 tokens behind 250, but the model's config says 256" in capsys.readouterr().err
    assert main(["latency", str(learned), "--tokens", "300", "--phase", "prefill"]) == 2
    assert "set --tokens: 256" in capsys.readouterr().err
    assert main(["latency", str(learned), "--tokens", "256", "--phase", "decode"]) == 2
    with pytest.raises(SpecError, match="leave --engine out"):
        list(compare_run("transformers", encoder, encoder, ()))


def test_numbers_that_are_too_small_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nowhere", "--new", "0"]) == 2
    assert "--tokens, --new, --rounds and --threads must be at least 1" in capsys.readouterr().err
