"""Text that a model writes itself, and calibration on it."""

import json
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.calibration import load_tokenizer
from tests.conftest import MakeJob, MakeModel


def written(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The documents that the command prints."""
    assert main(["generate", *words]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_a_model_writes_as_many_tokens_as_are_wanted_and_the_same_again(
    make_model: MakeModel, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    options = (str(model), "--tokens", "300", "--length", "32", "--batch", "4")
    texts = written(capsys, *options, "--prompts", str(text_file))
    tokenizer = load_tokenizer(model)
    sizes = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert sum(sizes[:-1]) < 300 <= sum(sizes)
    assert written(capsys, *options, "--prompts", str(text_file)) == texts
    assert written(capsys, *options, "--prompts", str(text_file), "--seed", "1") != texts
    assert main(["generate", *options]) == 3  # this tokenizer has no first token
    assert "no first token; give --prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_what_it_writes_serves_as_calibration_text(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, own = make_model(), tmp_path / "own.jsonl"
    (tmp_path / "prompts.txt").write_text("Something to go on from, and some more. " * 9)
    texts = written(
        capsys,
        str(model),
        "--tokens",
        "600",
        "--length",
        "64",
        "--prompts",
        str(tmp_path / "prompts.txt"),
    )
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = load_job(
        make_job(model, budget={"kv_groups": 1}, calibration={"mix": [{"path": str(own)}]})
    )
    report = run_job(job, tmp_path / "run", lambda _: None)
    assert report.decoder_parameters.ratio < 1


def test_what_cannot_be_is_said(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, empty = str(make_model()), tmp_path / "empty.txt"
    empty.write_text("")
    for words, code, said in (
        ([str(tmp_path)], 3, str(tmp_path)),
        ([model, "--temperature", "0"], 2, "--temperature above 0"),
        ([model, "--tokens", "0"], 2, "--tokens, --length and --batch must be at least 1"),
        ([model, "--prompts", str(empty)], 2, "holds no text"),
        ([model, "--prompts", str(tmp_path / "absent.txt")], 2, "cannot be read"),
    ):
        assert main(["generate", *words]) == code
        assert said in capsys.readouterr().err
