"""What is said of a model folder from its headers alone."""

import json
import re
import shutil
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.planning.inspection import inspect
from rayprune.orchestrator.reporting.inspection_view import inspection_parts, spans
from rayprune.orchestrator.reporting.tables import Table
from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import planned_checkpoint
from tests.conftest import edit_json
from tests.models import build_model


def test_groups_and_ways_of_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build_model(tmp_path / "dense", "qwen2")
    found = inspect(folder)
    heads, neurons = found.groups
    assert (heads.title, heads.most, heads.least, heads.layers) == ("KV groups", 2, 2, 3)
    assert (neurons.title, neurons.most, neurons.unit_parameters) == ("FFN channels", 48, 96)
    norms = found.checkpoint.decoder_parameters - heads.parameters - neurons.parameters
    assert norms == 3 * 2 * 32 + 0
    ways = [(way.target, way.kept, way.written_as) for way in found.writings]
    assert ways == [
        ("transformers", (2, 1), "qwen2"),
        ("vllm", (2,), "qwen2"),
        ("vllm", (1,), "llama"),
    ]
    assert main(["inspect", str(folder)]) == 0
    assert "2 to 1" in capsys.readouterr().out


def test_what_cannot_be_written_is_said_with_the_reason(tmp_path: Path) -> None:
    found = inspect(build_model(tmp_path / "dense", "gpt2"))
    heads = found.groups[0]
    assert heads.fixed
    first, rest = [way for way in found.writings if way.target == "transformers"]
    assert (first.kept, first.written_as) == ((heads.most,), "gpt2")
    assert (rest.written_as, rest.why_not) == (None, heads.fixed)
    what_can_go = next(part for part in inspection_parts(found) if isinstance(part, Table))
    assert [row[-1] for row in what_can_go.rows] == ["all stay", "41.6%"]


def test_an_unknown_type_gets_what_could_be_recognised(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "dense")
    edit_json(folder / "config.json", model_type="brand_new")
    with pytest.raises(ModelError) as error:
        inspect(folder)
    with pytest.raises(ModelError, match=re.escape(str(error.value))):
        planned_checkpoint(folder)  # as `plan` and `run` say it
    for words in ("3 layers at model.layers", "mlp.down_proj.weight", "llama", "adding-a-family"):
        assert words in str(error.value)
    config = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no safetensors weights to look at"):
        inspect(folder)


def test_numbers_as_spans() -> None:
    assert spans((8,)) == "8"
    assert spans((8, 7, 6, 3, 1)) == "8 to 6, 3, 1"
