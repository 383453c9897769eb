"""What `validate`, `plan` and `run` say before any work: file, place and remedy, in a second."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import rayprune
import rayprune.orchestrator.entry
from benchmarks.random_model import byte_tokenizer
from rayprune.orchestrator.cli import main
from rayprune.orchestrator.stages.evaluation import doubts
from rayprune.orchestrator.stages.subject import Judged
from rayprune.specs.errors import ModelError, RaypruneError, SpecError
from rayprune.specs.loader import load_job
from rayprune.specs.own_text import OwnTextSpec
from rayprune.specs.texts import TextSpec
from rayprune.specs.training import RecoverSpec
from rayprune.workers.machine import device, host
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.own_text import Author
from rayprune.workers.store.layout import PLAN_FILE
from rayprune.workers.texts.own import Turns
from tests.conftest import edit_json, write_job
from tests.models import build_model

Capture = pytest.CaptureFixture[str]
Monkey = pytest.MonkeyPatch
RECOVER = {"batch": 1, "samples": 2}


class Wrong:
    """A sound job's parts, to be spoiled."""

    def __init__(self, folder: Path, monkeypatch: Monkey) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.model, self.text = folder / "dense", folder / "a.txt"
        self.sections: dict[str, Any] = {"calibration": {"samples": 4, "shards": 2}}

    def texts(self, **options: Any) -> None:
        self.sections["calibration"] |= options

    def file(self, name: str, content: str) -> str:
        (self.folder / name).write_text(content)
        return str(self.folder / name)


def damaged_index(wrong: Wrong) -> None:
    (wrong.model / "model.safetensors").rename(wrong.model / "a.safetensors")
    places = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (wrong.model / "model.safetensors.index.json").write_text(json.dumps(places))


def ids_beyond(wrong: Wrong) -> None:
    np.save(wrong.folder / "ids.npy", (np.arange(1000) + 200) % 270)
    wrong.texts(path=str(wrong.folder / "ids.npy"))


def large_tokenizer(wrong: Wrong) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"extra{number}" for number in range(9)])
    tokenizer.save_pretrained(wrong.model)
    wrong.texts(path=wrong.file("b.txt", "words and extra8 words " * 50))


def no_disk(wrong: Wrong) -> None:
    wrong.monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))


def no_package(name: str, **recover: Any) -> Callable[[Wrong], None]:
    def spoil(wrong: Wrong) -> None:
        wrong.monkeypatch.setitem(sys.modules, name, None)
        wrong.sections |= {"recover": RECOVER | recover, "cluster": {"executor": "ray"}}

    return spoil


def sentencepiece(wrong: Wrong) -> None:
    for file in wrong.model.glob("tokenizer*"):
        file.unlink()
    (wrong.model / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15")
    wrong.monkeypatch.setitem(sys.modules, "sentencepiece", None)


def evaluated(**options: Any) -> Callable[[Wrong], None]:
    def spoil(wrong: Wrong) -> None:
        wrong.sections["evaluation"] = {"path": str(wrong.text), "window": 8} | options

    return spoil


def link_out(name: str) -> Callable[[Wrong], None]:
    def spoil(wrong: Wrong) -> None:
        secret = wrong.file("secret", "{}")
        (wrong.model / name).unlink(missing_ok=True)
        (wrong.model / name).symlink_to(secret)

    return spoil


WRONG: dict[str, tuple[Callable[[Wrong], object], int, str]] = {
    "missing model": (
        lambda w: setattr(w, "model", w.folder / "gone"),
        3,
        "gone: no such model folder; set model.path",
    ),
    "hub name": (
        lambda w: setattr(w, "model", Path("HuggingFaceTB/SmolLM2-135M")),
        4,
        "HuggingFaceTB/SmolLM2-135M at main: no such folder, and it cannot be fetched from the Hub",
    ),
    "missing text": (lambda w: w.texts(path="/gone.txt"), 2, "/gone.txt: cannot be read: No such"),
    "wrong field": (
        lambda w: w.texts(path=w.file("b.jsonl", '{"body": "x"}\n' * 9), field="bdy"),
        2,
        "b.jsonl:1: no key 'bdy'; set field to the key that holds the text: did you mean 'body'?",
    ),
    "short text": (
        lambda w: w.texts(path=w.file("b.txt", "A few words.")),
        2,
        "b.txt: too short: 4 samples of 64 tokens need 256 tokens, the text has 12;",
    ),
    "text too short for a training": (
        lambda w: w.sections.update(recover=RECOVER | {"samples": 4000}),
        2,
        "give a longer text, or lower recover.samples or calibration.sequence_length",
    ),
    "short evaluation": (
        lambda w: evaluated(path=w.file("b.txt", "A few words."), window=64)(w),
        2,
        "b.txt: too short: one window needs 64 tokens, the text has 12; lower evaluation.window",
    ),
    "ids beyond the vocabulary": (ids_beyond, 2, "ids.npy: token 260 ("),
    "tokens beyond the vocabulary": (large_tokenizer, 3, "b.txt: token 264 ("),
    "no disk": (no_disk, 4, "(export) needs"),
    "no package": (no_package("peft", lora={"rank": 2}), 4, "peft is missing, which recover.lora"),
    "no package for the tokenizer": (sentencepiece, 3, "pip install sentencepiece protobuf"),
    **{
        f"link out of the folder, {name}": (link_out(name), 3, f"{name}: links to ")
        for name in ("LICENSE", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
    },
    "damaged index": (damaged_index, 3, "gone.safetensors: no such file, but model.safetensors."),
    "chat without a template": (
        lambda w: w.texts(
            path=w.file("c.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n' * 9)
        ),
        2,
        "c.jsonl: holds chats, but the model has no chat template",
    ),
    "judged by itself": (evaluated(), 2, "is read for calibration or training too"),
    "blank": (lambda w: w.texts(path=w.file("b.txt", "\n" * 999)), 2, "nothing but blanks"),
    "one token": (lambda w: w.texts(path=w.file("b.txt", "a" * 9999)), 2, "are token"),
    "no weight for a text": (
        lambda w: w.texts(mix=[{"path": str(w.text), "weight": 1e-6}]),
        2,
        "none of the 4 samples",
    ),
    "budget": (lambda w: w.sections.update(budget={"sparsity": 0.99}), 2, "lower budget.sparsity"),
    "pipe": (lambda w: w.texts(path="/dev/zero"), 2, "/dev/zero: cannot be read: a device"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def wrong(dense: Path, tmp_path: Path, text_file: Path, monkeypatch: Monkey) -> Wrong:
    shutil.copytree(dense, tmp_path / "dense")
    shutil.copy(text_file, tmp_path / "a.txt")
    return Wrong(tmp_path, monkeypatch)


def job_of(wrong: Wrong) -> Path:
    return write_job(wrong.folder / "job.yaml", wrong.text, wrong.model, **wrong.sections)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_jobs_are_refused_at_once(kind: str, wrong: Wrong, capsys: Capture) -> None:
    spoil, code, words = WRONG[kind]
    spoil(wrong)
    job, out = str(job_of(wrong)), str(wrong.folder / "run")
    for command in (["validate", job, "--out", out], ["run", job, "--out", out]):
        start = time.process_time()
        assert main(command) == code
        assert time.process_time() - start < 2
        message = capsys.readouterr().err
        assert words in message
        assert "Traceback" not in message
    assert not Path(out).exists()
    if kind != "no disk":  # a plan has no folder yet
        assert main(["plan", job]) == code
        assert words in capsys.readouterr().err


def test_a_sound_job_is_valid(wrong: Wrong, capsys: Capture) -> None:
    job = str(job_of(wrong))
    for options in ([], ["--deep"], ["--out", str(wrong.folder / "runs" / "one")]):
        assert main(["validate", job, *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{job}: valid"
    assert not (wrong.folder / "runs").exists()


@pytest.mark.parametrize("out", ["a.txt", "a.txt/run", "/proc/none/run"])
def test_a_run_folder_that_cannot_be_is_refused(out: str, wrong: Wrong, capsys: Capture) -> None:
    job = str(job_of(wrong))
    for command in ("validate", "run"):
        assert main([command, job, "--out", str(wrong.folder / out)]) in (2, 4)
        message = capsys.readouterr().err
        assert "choose another --out" in message
        assert "Traceback" not in message


def test_windows_beyond_the_positions(wrong: Wrong, capsys: Capture) -> None:
    """Computed ones are warned of, in plan and report as well; learned ones refused."""
    wrong.texts(sequence_length=300)
    job = str(job_of(wrong))
    words = "calibration.sequence_length: 300 tokens, but the model's config says 256 positions"
    assert [w for w in rayprune.validate(job) if w.startswith(words)]
    assert [w for w in rayprune.plan(job).warnings if w.startswith(words)]
    report = rayprune.run(job, wrong.folder / "run")
    assert len([w for w in report.warnings if w.startswith(words)]) == 1
    assert words in (wrong.folder / "run" / PLAN_FILE).read_text()
    shutil.rmtree(wrong.model)
    build_model(wrong.model, "gpt2")
    assert main(["validate", job]) == 2
    assert f"{words}, and it has learned no others; set" in capsys.readouterr().err


def test_documents_of_its_own_fit_the_positions(wrong: Wrong) -> None:
    """With all of what they go on from: of chats the template's whole beginning."""
    model = build_model(wrong.folder / "gpt2", "gpt2")
    own = {"prompts": "none", "length": 256, "tokens": 256}
    job: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {
            "path": str(wrong.text),
            "samples": 4,
            "sequence_length": 32,
            "shards": 2,
            "own": own,
        },
        "cluster": {"executor": "in-process"},
    }
    message = r"calibration\.own\.length: 256 tokens behind 1, but the model's config says 256"
    with pytest.raises(SpecError, match=message):
        rayprune.generate(job, wrong.folder / "own")
    text, cpu = TextSpec(path=str(wrong.text)), torch.device("cpu")
    spec = OwnTextSpec(prompts="chat", length=32)
    author = Author(open_checkpoint(model), spec, text, torch.float32, cpu)
    vars(author)["_turns"] = Turns((1,) * 230, ((1,), (1,)), (1, 1))
    message = r"calibration\.own\.length: 32 tokens behind 230, but"
    with pytest.raises(SpecError, match=message):
        author._prompts(range(2))


def test_prompts_and_their_continuations_fit_the_positions(wrong: Wrong, capsys: Capture) -> None:
    shutil.rmtree(wrong.model)
    build_model(wrong.model, "gpt2")
    wrong.sections["evaluation"] = {
        "path": wrong.file("other.txt", "A text of its own, for the evaluation alone. " * 40),
        "window": 16,
        "prompts": ["a", "aaaa"],
        "prompt_tokens": 252,
    }
    job = str(write_job(wrong.folder / "job.yaml", wrong.text, wrong.model, **wrong.sections))
    assert main(["validate", job]) == 0
    assert main(["validate", job, "--set", "evaluation.prompt_tokens=253"]) == 2
    words = "evaluation.prompt_tokens: 253 tokens behind 4, but the model's config says 256"
    assert words in capsys.readouterr().err


def test_what_only_tokens_can_tell_is_told_by_a_deep_look(wrong: Wrong, text_file: Path) -> None:
    """A tokenizer that the fast one does not stand for; a copy of the text; training alone."""
    tail = wrong.folder / "copy.txt"
    tail.write_text(text_file.read_text()[100:5000])
    evaluated(path=str(tail))(wrong)
    job = load_job(job_of(wrong))
    rayprune.validate(job)
    with pytest.raises(SpecError, match="of its tokens stand in the windows for calibration"):
        rayprune.validate(job, deep=True)


def test_windows_of_a_training_alone_are_looked_at_too(wrong: Wrong) -> None:
    text = wrong.text.read_text()[:256] + "\n" * 20000
    wrong.texts(path=wrong.file("b.txt", text))
    wrong.sections["recover"] = RECOVER | {"samples": 300}
    job = load_job(job_of(wrong))
    for deep in (False, True):
        with pytest.raises(SpecError, match=r"tokens that are read are token \d+"):
            rayprune.validate(job, deep=deep)
    with pytest.raises(SpecError, match=r"tokens that are read are token \d+"):
        rayprune.run(job, wrong.folder / "run")


def test_a_deep_look_blames_the_config_for_its_values(wrong: Wrong) -> None:
    edit_json(wrong.model / "config.json", id2label=3)
    job = load_job(job_of(wrong))
    rayprune.validate(job)
    with pytest.raises(ModelError, match=r"config\.json: transformers refuses it"):
        rayprune.validate(job, deep=True)


def test_a_plan_on_paper_needs_no_texts(wrong: Wrong) -> None:
    (wrong.model / "model.safetensors").unlink()
    wrong.texts(path="/gone.txt")
    job = load_job(job_of(wrong))
    assert rayprune.plan(job).model.parameters
    with pytest.raises(RaypruneError, match="no weights found"):
        rayprune.validate(job)


def test_a_plan_for_another_cluster_needs_no_packages_here(wrong: Wrong) -> None:
    no_package("peft", lora={"rank": 2})(wrong)
    wrong.sections["cluster"]["address"] = "ray://there:10001"
    assert rayprune.plan(load_job(job_of(wrong))).tasks


def test_a_type_that_this_machine_is_slow_in_is_said(wrong: Wrong, capsys: Capture) -> None:
    wrong.sections |= {"recover": RECOVER | {"dtype": "bfloat16"}, "parallel": {"device": "cpu"}}
    for pace, is_said in ((9.4, True), (0.5, False)):
        wrong.monkeypatch.setattr(device, "bfloat16_pace", lambda pace=pace: pace)
        assert main(["validate", str(job_of(wrong))]) == 0
        told = "warning: recover.dtype: bfloat16, for which this machine has no instructions"
        assert (told in capsys.readouterr().out) == is_said
    wrong.sections["cluster"] = {"executor": "ray", "address": "ray://there:10001"}
    wrong.monkeypatch.setattr(device, "bfloat16_pace", lambda: 9.4)
    assert main(["validate", str(job_of(wrong))]) == 0
    assert "bfloat16" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"parallel": {"workers": 2}}, "one process does all work, parallel.workers aside"),
        ({"budget": {"round_to": 8}, "method": "trsp"}, "budget.round_to: is of widths, and"),
    ],
)
def test_what_says_nothing_to_a_job_is_told(
    sections: dict[str, Any], told: str, wrong: Wrong, capsys: Capture
) -> None:
    job = job_of(wrong)
    job.write_text(yaml.safe_dump(yaml.safe_load(job.read_text()) | sections))
    assert main(["validate", str(job)]) == 0
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_gpu_that_is_not_here_is_missed(wrong: Wrong, capsys: Capture) -> None:
    wrong.monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wrong.sections["parallel"] = {"device": "cuda"}
    job = str(job_of(wrong))
    assert main(["plan", job]) == 0
    assert main(["validate", job]) == 4
    assert "parallel.device: cuda, but torch finds no GPU here" in capsys.readouterr().err


def test_a_product_is_timed_in_both_types() -> None:
    assert 0.01 < host.bfloat16_pace() < 1000


def test_a_recovery_that_made_it_worse_is_said() -> None:
    """By what it was trained for: a distillation may well have a worse perplexity."""
    numbers = {"perplexity": 9.0, "divergence": 0.2}
    distilled, by_text = RecoverSpec(), RecoverSpec(loss="lm")
    for recover, measure, other, told in (
        (by_text, "perplexity", "divergence", "perplexity 9 before it, 4e+239"),
        (distilled, "divergence", "perplexity", "KL divergence 0.2 before it, 4e+239"),
    ):
        judged = {"before": Judged(numbers, {}), "after": Judged(numbers, {})}
        assert doubts(None, recover) == doubts(judged, recover) == []
        for grown in ({other: 4e239}, {measure: 1.0005 * numbers[measure]}):
            assert doubts(judged | {"recovered": Judged(numbers | grown, {})}, recover) == []
        worse = judged | {"recovered": Judged(numbers | {measure: 4e239}, {})}
        (warning,) = doubts(worse, recover)
        assert warning.startswith(f"recovery made the model worse: {told}")
