"""Models measured side by side."""

from dataclasses import asdict

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.reporting.speed_view import speed_table
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.tools.bench import bench
from tests.conftest import MakeModel


@pytest.mark.slow
def test_sizes_are_right_and_speeds_are_those_of_the_models(make_model: MakeModel) -> None:
    models = [make_model(), make_model(name="smaller", num_key_value_heads=1, num_hidden_layers=2)]
    dense, small = bench(models, tokens=16, new=3, rounds=2, threads=1, dtype="float32")
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
    shown = speed_table([asdict(dense), asdict(small)])
    assert [name.rpartition("/")[2] for name in shown.columns[1:]] == ["dense", "smaller"]
    assert shown.rows[2] == ["KV bytes per token", "384", "128"]


def test_numbers_that_are_too_small_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nowhere", "--new", "0"]) == 2
    assert "--tokens, --new, --rounds and --threads must be at least 1" in capsys.readouterr().err
