"""Texts of every form in whole runs: what is recorded and shown, and what stops a run at once."""

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from benchmarks.random_model import byte_tokenizer
from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.run_folder import read_events
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.models import begun

Capture = pytest.CaptureFixture[str]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def model_bytes(run: Path) -> dict[str, bytes]:
    """All files but the manifest and the card, which name the inputs."""
    found = folder_bytes(run / "model")
    return {name: found[name] for name in found.keys() - {"manifest.json", "README.md"}}


def test_the_same_documents_give_the_same_model(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    documents = text_file.read_text().split("\n\n")
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "b").mkdir()
    half = rows.index("\n", len(rows) // 2) + 1
    (tmp_path / "b" / "1.jsonl").write_text(rows[:half])
    (tmp_path / "b" / "2.gz").write_bytes(gzip.compress(rows[half:].encode()))
    model = make_model()
    for name in ("a.parquet", "b"):
        job = make_job(model, f"{name}.yaml", calibration={"path": str(tmp_path / name)})
        assert main(["run", str(job), "--out", str(tmp_path / f"{name}.run")]) == 0
    first, second = tmp_path / "a.parquet.run", tmp_path / "b.run"
    assert model_bytes(first) == model_bytes(second)
    manifest = json.loads((second / "tasks" / "calibration-tokens" / "manifest.json").read_text())
    [facts] = manifest["info"]["texts"]
    assert (facts["forms"], facts["fields"], facts["tokens"]) == (["jsonl"], ["text"], 1024)
    [event] = events(second, "text")
    assert event["path"] == str(tmp_path / "b")
    assert {key: event[key] for key in facts} == facts


def test_what_windows_begin_with_belongs_to_the_protocol(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, held_out = make_model(), tmp_path / "held_out.txt"
    begun(byte_tokenizer()).save_pretrained(model)
    held_out.write_text(text_file.read_text()[30_000:40_000])
    job = make_job(model, evaluation={"path": str(held_out), "window": 32, "max_windows": 4})
    for name, words in (("begun", []), ("cut", ["--set", "evaluation.bos=false"])):
        assert main(["run", str(job), "--out", str(tmp_path / name), *words]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert ("window 32, each begun with <bos>, stride 32" in told) is (name == "begun")
        tokens = tmp_path / name / "tasks" / "evaluation-tokens" / "tokens.safetensors"
        first_N = load_file(tokens)["tokens"][:, 0]
        assert first_N.eq(1).tolist() == [True, *[name == "begun"] * 3]
        calibrated = load_file(tmp_path / name / "tasks/calibration-tokens/tokens.safetensors")
        assert calibrated["tokens"][:, 0].eq(1).all()
        card = (tmp_path / name / "model" / "README.md").read_text()
        assert ("32 tokens, each begun with &lt;bos&gt;, stride 32" in card) is (name == "begun")
    assert main(["compare", str(tmp_path / "begun"), str(tmp_path / "cut")]) == 0
    assert "each begun with <bos>" in " ".join(capsys.readouterr().out.split())


def test_another_file_in_the_folder_is_noticed(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(text_file.read_text()[number * 9000 :][:9000])
    job, run = make_job(make_model(), calibration={"path": str(folder)}), tmp_path / "run"
    assert main(["run", str(job), "--out", str(run)]) == 0
    (folder / "1.txt").write_text("other words " * 999)
    capsys.readouterr()
    assert main(["run", str(job), "--out", str(run)]) == 0
    stale = [event["task"] for event in read_events(run) if event["event"] == "task-stale"]
    assert stale[0] == "calibration-tokens"


def test_token_ids_need_no_tokenizer_of_the_text(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    ids = np.random.default_rng(0).integers(0, 260, (16, 64))
    np.save(tmp_path / "ids.npy", ids)
    job = make_job(make_model(), calibration={"path": str(tmp_path / "ids.npy")})
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 0
    tokens = load_file(tmp_path / "run/tasks/calibration-tokens/tokens.safetensors")["tokens"]
    assert (tokens.numpy() == ids).all()
    ids[3, 5] = 260
    np.save(tmp_path / "ids.npy", ids)
    assert main(["run", str(job), "--out", str(tmp_path / "other")]) == 2
    assert "ids.npy: token 260" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["calibration", "evaluation"])
def test_a_tokenizer_that_is_too_large_stops_the_run_first(
    which: str,
    make_model: MakeModel,
    make_job: MakeJob,
    text_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    model = make_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken(f"<extra{number}>") for number in range(9)])
    tokenizer.save_pretrained(model)
    odd = tmp_path / "odd.txt"
    odd.write_text("".join(f"Some words {number} <extra8> more. " for number in range(999)))
    sections: dict[str, Any] = {"evaluation": {"path": str(odd), "window": 64, "max_windows": 8}}
    if which == "calibration":
        sections = {"calibration": {"path": str(odd)}}
    assert main(["run", str(make_job(model, **sections)), "--out", str(tmp_path / "run")]) == 3
    message = capsys.readouterr().err
    assert "odd.txt: token" in message
    assert "260 rows: the tokenizer is larger than the model" in message
    tasks = {folder.name for folder in (tmp_path / "run" / "tasks").glob("*")}
    assert tasks <= {"calibration-tokens"}


def test_what_harms_is_said_and_the_run_goes_on(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text(text_file.read_text()[30_000:])
    job = make_job(
        make_model(max_position_embeddings=32),
        evaluation={"path": str(tmp_path / "other.txt"), "window": 16, "max_windows": 4},
    )
    for _ in range(2):
        assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 0
    warnings = [event["text"] for event in events(tmp_path / "run", "warning")]
    assert sum("calibration.sequence_length: 64 tokens, but" in text for text in warnings) == 2
    assert sum("cannot be told with windows of 16 tokens" in text for text in warnings) == 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("64 tokens, but the model", "cannot be told with windows of 16 tokens"):
        assert sum(words in text for text in report["warnings"]) == 1
        assert words in page


@pytest.mark.parametrize("section", ["calibration", "evaluation"])
def test_a_pipe_does_not_hang_a_run(
    section: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    options = {"path": str(tmp_path / "pipe.txt")}
    start = time.monotonic()
    job = make_job(make_model(), **{section: options})
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 2
    assert (
        "pipe.txt: cannot be read: a named pipe; write the text to a file"
        in capsys.readouterr().err
    )
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("content", "words"), [(b"", "too short"), (b"{a}", "format: text")])
def test_prompts_are_looked_at_before_the_model(
    content: bytes, words: str, make_model: MakeModel, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert main(["generate", str(make_model()), "--prompts", str(path), "--tokens", "64"]) == 2
    message = capsys.readouterr().err
    assert "prompts.txt" in message
    assert words in message or "holds no text" in message
